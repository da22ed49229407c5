"""What a worker builds once: the model, its explainer, and the way rows go through it."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fxshap.datasets.columns import Array
from fxshap.errors import AdditivityError, FxshapError, InputError, OutputError
from fxshap.explainer import DeepExplainer
from fxshap.module import ExplainableModule
from fxshap.runtime.arrays import ArrayAttributions, additivity_errors, tolerance

#: How many explainers a process keeps.
MAX_CACHED = 4
_cached: OrderedDict[str, RowExplainer] = OrderedDict()
_locks = [Lock()]


def row_explainer(key: str, build: Callable[[], RowExplainer]) -> RowExplainer:
    """Return the explainer of this key, and build it if this process has not."""
    with _locks[-1]:
        if key not in _cached:
            _cached[key] = build()
            while len(_cached) > MAX_CACHED:
                _cached.popitem(last=False)
        _cached.move_to_end(key)
        return _cached[key]


def reset_after_fork() -> None:
    """Build again after fork: the parent's threads may hold the lock, and its GPU is not shared."""
    _locks[:] = [Lock()]
    _cached.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=reset_after_fork)


@dataclass(frozen=True)
class ExplainedRows(ArrayAttributions):
    """Attributions of rows, of which some have none.

    Attributes
    ----------
    scale : ndarray
        What additivity errors are relative to, of shape (rows,).
    reasons : dict of int to str
        Why rows are not explained. Their attributions are NaN.
    """

    scale: Array
    reasons: dict[int, str]

    def relative_errors(self, values: Sequence[Array], expected: Array, output: Array) -> Array:
        """Return the additivity errors of values, of shape (rows,), relative to the outputs."""
        errors = additivity_errors(values, expected, output).max(1, initial=0)
        largest: Array = errors / np.where(self.scale > 0, self.scale, 1)
        return largest


@dataclass(frozen=True)
class Rows:
    """What is explained: inputs, other arguments and outputs, with the rows first.

    Attributes
    ----------
    inputs : sequence of ndarray
    arguments : mapping of str to ndarray
    outputs : ndarray, sequence of int or None
        The outputs of each row, or those of all rows.
    """

    inputs: Sequence[Array]
    arguments: Mapping[str, Array]
    outputs: Any

    def take(self, rows: Array | slice) -> Rows:
        """Return some of the rows."""
        arguments = {name: x[rows] for name, x in self.arguments.items()}
        outputs = self.outputs[rows] if np.ndim(self.outputs) > 1 else self.outputs
        return Rows([x[rows] for x in self.inputs], arguments, outputs)


@dataclass
class RowExplainer:
    """Explains rows of arrays, and finds those that cannot be explained.

    Attributes
    ----------
    explainer : DeepExplainer
    ranked_outputs : int, optional
        How many of the largest outputs of each row are explained.
    record : bool
        Whether rows that cannot be explained are recorded, and not an error.
    seconds : float
        How long it took to build.
    digest : str
        A digest of the model's weights.
    template : ArrayAttributions, optional
        Attributions of a row, for their shapes.
    """

    explainer: DeepExplainer
    ranked_outputs: int | None
    record: bool
    seconds: float = 0.0
    digest: str = ""
    template: ArrayAttributions | None = None

    @classmethod
    def build(
        cls,
        model: Any,
        background: Sequence[Array],
        *,
        batch_size: int | Literal["auto"],
        device: str,
        ranked_outputs: int | None,
        record: bool,
        options: Mapping[str, Any],
    ) -> RowExplainer:
        """Build the model on its device, and record the background.

        Parameters
        ----------
        model : nn.Module, (nn.Module, nn.Module) or callable
        background : sequence of ndarray
        batch_size, device, ranked_outputs, record, options
            Those of :class:`BatchExplainer`.
        """
        start = time.perf_counter()
        if not isinstance(model, nn.Module | tuple):
            model = model()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = on_device(model, torch.device(device))
        options = {name: to_device(value, device) for name, value in options.items()}
        if not has_options(model):
            options.setdefault("progress", False)
        given = list(background) if len(background) > 1 else background[0]
        explainer = DeepExplainer(model, given, batch_size=batch_size, **options)
        explainer.progress = False
        digest = model_digest(explainer.explainable)
        return cls(explainer, ranked_outputs, record, time.perf_counter() - start, digest)

    def explain(
        self,
        inputs: Sequence[Array],
        arguments: Mapping[str, Array],
        outputs: Any,
        errors: Mapping[int, str],
        where: Callable[[int], str],
    ) -> ExplainedRows:
        """Return the attributions of all rows that can be explained.

        Parameters
        ----------
        inputs : sequence of ndarray
        arguments : mapping of str to ndarray
            Other arguments of the model, with one row for each sample.
        outputs : ndarray, sequence of int or None
            The outputs to explain, the same for all rows or with a row for each.
        errors : mapping of int to str
            Rows that cannot be explained, as is known already, with the reasons.
        where : callable
            Returns the name of a row.

        Raises
        ------
        InputError
            If a row cannot be explained, and errors are not recorded.
        AdditivityError
            If the attributions of a row do not sum to the difference of the outputs.
        """
        count, reasons = len(inputs[0]), dict(errors)
        good = np.array([i for i in range(count) if i not in reasons], dtype=np.int64)
        call = Rows(inputs, arguments, outputs)
        parts = list(self._parts(call, good, reasons, where))
        result = self._scatter(parts, call, count, reasons)
        if parts:
            self._check_sums(result, where)
        return result

    def _check_sums(self, result: ExplainedRows, where: Callable[[int], str]) -> None:
        """Raise an AdditivityError unless the attributions of every explained row add up."""
        relative = result.relative_errors(result.values, result.expected, result.output)
        limit = tolerance(self.explainer.explainable.compute_dtype)
        explained = np.array([i not in result.reasons for i in range(len(relative))])
        wrong = explained & ~(relative <= limit)
        if wrong.any():
            worst = int(np.where(wrong, np.nan_to_num(relative, nan=np.inf), -1).argmax())
            raise AdditivityError(
                f"the attributions of {where(worst)} do not sum to the difference of the outputs: "
                f"the error is {relative[worst]:.1e} of the largest output, and rounding explains "
                f"{limit:.0e}; fxshap.verify names the operation that leaks"
            )

    def _parts(
        self, call: Rows, rows: Array, reasons: dict[int, str], where: Callable[[int], str]
    ) -> Iterator[tuple[Array, ArrayAttributions]]:
        """Yield attributions with their rows; rows that fail are recorded with the reason."""
        if not len(rows):
            return
        try:
            result = self._attributions(call.take(rows))
        except Exception as error:  # the user's model may raise anything
            if not may_depend_on_row(error):
                raise
            if self.template is None:
                self._find_template(call, error)
            if len(rows) > 1:  # search for the rows that fail
                middle = len(rows) // 2
                for half in (rows[:middle], rows[middle:]):
                    yield from self._parts(call, half, reasons, where)
            elif self.record:
                reasons[int(rows[0])] = " ".join(str(error).split())
            else:
                raise InputError(f"{where(int(rows[0]))} cannot be explained: {error}") from error
        else:
            self.template = self.template or result
            yield rows, result

    def _attributions(self, call: Rows) -> ArrayAttributions:
        arguments: dict[str, Any] = {
            name: np.ascontiguousarray(x) for name, x in call.arguments.items()
        }
        return self.explainer.attributions(
            call.inputs if len(call.inputs) > 1 else call.inputs[0],
            self.ranked_outputs,
            check_additivity=False,
            outputs=call.outputs,
            **arguments,
        )

    def _find_template(self, call: Rows, error: Exception) -> ArrayAttributions:
        """Return the attributions of a reference; raise the error if it has none either."""
        reference = [x[:1].cpu().numpy() for x in self.explainer.background]
        first = call.take(slice(1))
        outputs = first.outputs
        if np.ndim(outputs) > 1 and not len(outputs):  # of no rows
            outputs = np.zeros((1, outputs.shape[1]), dtype=np.int64)
        try:
            self.template = self._attributions(Rows(reference, first.arguments, outputs))
        except Exception:
            raise error from None
        return self.template

    def _scatter(
        self,
        parts: Sequence[tuple[Array, ArrayAttributions]],
        call: Rows,
        count: int,
        reasons: dict[int, str],
    ) -> ExplainedRows:
        """Return the attributions of all rows, NaN for those that are not explained."""
        template = self.template
        if template is None:  # no row can be explained, or there is none
            template = self._find_template(call, InputError(f"no row of {count} can be explained"))
        if len(parts) == 1 and len(parts[0][0]) == count:
            whole = parts[0][1]
        else:
            whole = ArrayAttributions(
                [filled(v, count, np.nan) for v in template.values],
                filled(template.expected, count, np.nan),
                filled(template.output, count, np.nan),
                filled(template.columns, count, 0),
            )
            for rows, part in parts:
                for whole_array, array in zip(arrays_of(whole), arrays_of(part), strict=True):
                    whole_array[rows] = array
        scale = np.maximum(
            np.abs(whole.output).max(1, initial=0),
            self.explainer.output_scale[whole.columns].max(1, initial=0),
        )
        return ExplainedRows(
            whole.values, whole.expected, whole.output, whole.columns, scale, reasons
        )


# --- helpers ------------------------------------------------------------------------------------


def arrays_of(attributions: ArrayAttributions) -> list[Array]:
    """Return all arrays of attributions."""
    a = attributions
    return [*a.values, a.expected, a.output, a.columns]


def filled(like: Array, count: int, value: float) -> Array:
    """Return an array of rows like another's, filled with a value."""
    return np.full((count, *like.shape[1:]), value, dtype=like.dtype)


def may_depend_on_row(error: Exception) -> bool:
    """Return True for errors that the values of one row can cause."""
    if isinstance(error, FxshapError):
        return isinstance(error, InputError | OutputError)
    return not isinstance(error, torch.OutOfMemoryError | MemoryError)


def has_options(model: Any) -> bool:
    """Return True if a model is explainable already, with its own options."""
    return isinstance(model[0] if isinstance(model, tuple) else model, ExplainableModule)


def on_device(model: Any, device: torch.device) -> Any:
    """Return a model on a device: itself, or a copy if it is on another."""
    whole: nn.Module = model[0] if isinstance(model, tuple) else model
    tensors = [*whole.parameters(), *whole.buffers()]
    if all(x.device.type == device.type for x in tensors):
        return model
    copied = copy.deepcopy(model)
    (copied[0] if isinstance(copied, tuple) else copied).to(device)
    return copied


def to_device(value: Any, device: str) -> Any:
    """Return an option with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: to_device(x, device) for name, x in value.items()}
    return value


def model_digest(model: nn.Module) -> str:
    """Return a digest of the structure and the weights of a model."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {getattr(value, 'dtype', '')} ".encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
