"""Capture of an ``nn.Module`` and its inputs as one functional ATen graph.

``torch.export`` runs the model under a tracer at the level of PyTorch's dispatcher, so any Python
code can be captured. It returns a graph without in-place operations or module calls, with a
symbolic batch dimension. Weights are not copied: the graph holds views of the model's own storage.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, _trace

from fxshap._compat import export_workarounds, skips_contexts
from fxshap.capture.captured import Captured
from fxshap.capture.diagnostics import (
    convert_data_dependent_errors,
    explain_failure,
    first_line,
    is_data_dependent,
    takes_values,
)
from fxshap.capture.functionalize import functionalize
from fxshap.capture.groups import EnumerateGroups, GroupChoice
from fxshap.capture.recurrent import RecordRecurrent, without_packed_checks
from fxshap.capture.row_number import check_any_number, check_fixed_number
from fxshap.capture.tracing import RecordOwnOperators, trace_scripted_modules
from fxshap.capture.unlift import unlift
from fxshap.errors import CaptureError, FxshapError, InputError
from fxshap.frontend.hook_point import HookPoint, record_tensors, single_call
from fxshap.frontend.inputs import name_shapes_on_failure
from fxshap.frontend.outputs import Selector, select_output

logger = logging.getLogger("fxshap")

#: How a model is called with tensors: ``call(model, tensors)``.
ModelCall = Callable[[nn.Module, Sequence[Tensor]], Any]


def call_positionally(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Call a model with tensors as its positional arguments, and no others."""
    return model(*inputs)


def capture(
    model: nn.Module,
    inputs: Sequence[Tensor],
    output: Selector = None,
    explained: int | None = None,
    call: ModelCall = call_positionally,
    hook_point: HookPoint | None = None,
) -> Captured:
    """Capture `model` as a functional ATen graph.

    Parameters
    ----------
    model : nn.Module
        The user's model, in the mode to capture. It is not changed.
    inputs : sequence of Tensor
        Example inputs with the batch first. Their values do not matter. A model that fixes its
        number of rows in Python, as ``len(x)`` does, is captured for the number of rows of these.
    output : str, int, callable or None
        Which output to explain.
    explained : int, optional
        How many of the inputs are explained. They come first. The others are the same for samples
        and references. By default all inputs are explained.
    call : callable
        ``call(model, inputs)`` calls the model.
    hook_point : HookPoint, optional
        A point in the model. If it is given, the graph returns
        ``(output, (tensors at the hook point))``.

    Returns
    -------
    Captured

    Raises
    ------
    CaptureError
        If the model cannot be captured. The message names the user's line.
    OutputError
        If the output is not a floating-point tensor.
    """
    check_not_quantized(model)
    start = time.perf_counter()
    count = len(inputs) if explained is None else explained
    selected = SelectedOutput(model, output, call, hook_point, count)
    own = [x.detach() for x in inputs]
    captured = unlift(export(selected, own, [with_two_rows(x) for x in own]), model, count)
    if captured.rows not in (None, len(own[0])):
        fewer, captured = captured, unlift(export(selected, own, own), model, count)
        check_fixed_number(captured, fewer)
    check_any_number(captured)
    captured = replace(captured, assumed=selected.groups.assumed)
    seconds, nodes = time.perf_counter() - start, len(captured.module.graph.nodes)
    rows = "any number of" if captured.rows is None else captured.rows
    logger.debug(
        "captured %s for %s rows: %d nodes in %.1f s", type(model).__name__, rows, nodes, seconds
    )
    return captured


def check_not_quantized(model: nn.Module) -> None:
    """Raise a CaptureError if a module holds packed quantized weights, which have no derivative."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.") and hasattr(module, "_packed_params"):
            raise CaptureError(
                f"{name or 'the model'} is a {type(module).__module__}.{type(module).__name__}, "
                "whose quantized weights have no derivative; explain the model as it was before "
                "quantize_dynamic or convert"
            )


def with_two_rows(x: Tensor) -> Tensor:
    """Return the first two rows, or the only row twice: export specialises on a single row."""
    return x[:2] if len(x) > 1 else torch.cat([x, x])


class SelectedOutput(nn.Module):
    """The module that is exported: calls the user's model and selects the tensor to explain.

    The name of its attribute `model` begins every qualified name in the exported graph.

    Attributes
    ----------
    groups : GroupChoice
        Whether to take every group that rows are routed to as one with rows.
    """

    def __init__(
        self,
        model: nn.Module,
        output: Selector,
        call: ModelCall,
        hook_point: HookPoint | None,
        explained: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.call = call
        self.hook_point = hook_point
        self.explained = explained
        self.groups = GroupChoice()

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Return the tensor to explain, and if there is a hook point the tensors there."""
        if skips_contexts():
            return self.select(inputs)
        with (
            RecordOwnOperators(),
            RecordRecurrent(),
            trace_scripted_modules(self.model),
            without_packed_checks(self.model),
            convert_data_dependent_errors(),
        ):
            if not self.groups.enumerates:
                return self.select(inputs)
            with EnumerateGroups(inputs[: self.explained], self.groups):
                return self.select(inputs)

    @torch.no_grad()
    def check(self, inputs: Sequence[Tensor]) -> None:
        """Raise the model's own error, or that of the output, with the shapes of these inputs."""
        with name_shapes_on_failure(self.model, inputs):
            self.select(inputs)

    def accepts(self, inputs: Sequence[Tensor]) -> bool:
        """Return True if the model runs on these inputs."""
        try:
            self.check(inputs)
        except InputError:
            return False
        return True

    def select(self, inputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Call the model, and return what `forward` returns.

        A model that differentiates inside returns tensors that require a gradient. torch.export
        takes none, so they are detached.
        """
        if self.hook_point is None:
            return select_output(self.call(self.model, inputs), self.output).detach()
        with record_tensors(self.model, self.hook_point) as calls:
            result = select_output(self.call(self.model, inputs), self.output).detach()
        return result, tuple(x.detach() for x in single_call(self.hook_point, calls))


# --- torch.export -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportStrategy:
    """A way to export a model.

    Attributes
    ----------
    strict : bool
        Whether TorchDynamo interprets the model's Python code instead of running it. Only then can
        NumPy code be captured.
    symbolic : bool
        Whether the graph is for any number of rows.
    cast : bool
        Whether the casts that autocast inserts are recorded as operations. Otherwise the region
        under autocast is recorded, in which torch cannot decompose some operations.
    """

    strict: bool = False
    symbolic: bool = True
    cast: bool = False


#: Tried in this order. The first is the quickest and captures the most models.
EXPORT_STRATEGIES = (
    ExportStrategy(),
    ExportStrategy(cast=True),
    ExportStrategy(strict=True),
    ExportStrategy(symbolic=False),
)

#: torch.export below the level at which autocast acts. It has no public name.
export_after_autocast = partial(_trace._export, pre_dispatch=False)


def export(
    model: SelectedOutput, inputs: Sequence[Tensor], few: Sequence[Tensor]
) -> ExportedProgram:
    """Export with the first strategy that works, and decompose composite operations.

    Parameters
    ----------
    model : SelectedOutput
    inputs : sequence of Tensor
        The inputs of the call. Errors name their shapes.
    few : sequence of Tensor
        What to export with: fewer rows of them, or the inputs themselves.
    """
    # Contiguous clones, because export specialises on other strides.
    examples = tuple(x.contiguous().clone() for x in few)
    failures: list[Exception] = []
    for strategy in EXPORT_STRATEGIES:
        try:
            return export_with_strategy(model, examples, strategy)
        except FxshapError:
            model.check(inputs)
            raise
        except Exception as error:
            failures.append(error)
        logger.debug("not captured (%s): %s", strategy, first_line(failures[-1]))
        if len(failures) == 1:
            # If the model itself fails on these inputs, its own error is more helpful than ours.
            model.check(inputs)
            if few is not inputs and not model.accepts(few):  # it takes these rows only
                return export(model, inputs, inputs)
        if takes_values(failures[-1]):
            program = export_groups(model, examples)
            if program is not None:
                return program
        if is_data_dependent(failures[-1]):
            break
    raise CaptureError(explain_failure(failures[0])) from failures[0]


def export_groups(model: SelectedOutput, examples: tuple[Tensor, ...]) -> ExportedProgram | None:
    """Export the graph of inputs that leave no group empty; return ``None`` if that fails too."""
    model.groups.enumerates = True
    try:
        return export_with_strategy(model, examples, EXPORT_STRATEGIES[0])
    except Exception as error:  # the first failure names the line
        logger.debug("not captured with all groups: %s", first_line(error))
        model.groups.enumerates = model.groups.assumed = False
        return None


def export_with_strategy(
    model: SelectedOutput, examples: tuple[Tensor, ...], strategy: ExportStrategy
) -> ExportedProgram:
    """Export with one strategy, and decompose composite operations."""
    # The batch dimension of a single row cannot be symbolic.
    dims = tuple({0: Dim.AUTO} if strategy.symbolic and len(x) > 1 else None for x in examples)
    export_function = export_after_autocast if strategy.cast else torch.export.export
    with warnings.catch_warnings(), silence_torch(), torch.no_grad():
        warnings.simplefilter("ignore")
        with export_workarounds(model, strategy.strict):
            program = export_function(
                model, examples, dynamic_shapes=(dims,), strict=strategy.strict
            )
            program = functionalize(program)
    # Export leaves reference cycles, which keep the model and the tensors of our callers alive.
    gc.collect()
    return program


@contextmanager
def silence_torch() -> Iterator[None]:
    """Drop the warnings and errors that torch logs in this thread.

    They repeat errors that we raise ourselves or avoid by another strategy. What a user requests
    with ``TORCH_LOGS`` is below the level of a warning, and is printed.
    """
    thread = threading.get_ident()

    def admits(record: logging.LogRecord) -> bool:
        return threading.get_ident() != thread or record.levelno < logging.WARNING

    loggers = dict(logging.root.manager.loggerDict)
    handlers = {
        handler
        for name, log in loggers.items()
        if name.partition(".")[0] == "torch" and isinstance(log, logging.Logger)
        for handler in log.handlers
    }
    for handler in handlers:
        handler.addFilter(admits)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(admits)
