"""What the user holds: a model that answers plainly, and to SHAP with multipliers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from fxshap.asking import is_asking, is_hooked, remove_hooks
from fxshap.capture import Captured, capture, tensor_at
from fxshap.errors import CaptureError, InputError, ModelError
from fxshap.layout import Layout, probe_layout
from fxshap.output import Selector, require_rows, select_output
from fxshap.rewrite import Rewritten, rewrite
from fxshap.tape import Tape, Walk, explained


def make_explainable(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    output: Selector = None,
) -> ExplainableModule:
    """Make a model explainable by unmodified SHAP.

    Parameters
    ----------
    model : nn.Module
        Any PyTorch model that takes floating-point tensors with the batch first. It is not changed.
    example_inputs : Tensor or sequence of Tensor, optional
        Inputs to capture the model with now; their values do not matter. By default the model is
        captured at the first explanation.
    output : str, int or callable, optional
        Which tensor to explain of a model that returns a dict, a dataclass or a tuple: a key or
        attribute name, an index, or a function of the result. It must be of shape
        (rows, outputs) and floating point.

    Returns
    -------
    ExplainableModule
        Calls like `model`, with the same values and gradients, and gives
        ``shap.DeepExplainer`` attributions that sum to the difference of the outputs.

    Raises
    ------
    ModelError
        If `model` is not an ``nn.Module``.
    InputError
        If `example_inputs` are not floating-point tensors.
    CaptureError
        If `example_inputs` are given and the model cannot be captured with them.

    Notes
    -----
    The multipliers are the rescale rule of DeepLIFT (Shrikumar et al. 2017) and its extensions,
    averaged over references as in DeepSHAP (Lundberg and Lee 2017).

    Examples
    --------
    >>> import shap, torch, fxshap
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    >>> background, x = torch.randn(10, 4), torch.randn(3, 4)
    >>> explainable = fxshap.make_explainable(model)
    >>> shap.DeepExplainer(explainable, background).shap_values(x).shape
    (3, 4, 2)
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"make_explainable takes a torch.nn.Module, not a {type(model).__name__}; a function "
            "can be put into the forward method of a small nn.Module"
        )
    explainable = ExplainableModule(model, output)
    if example_inputs is not None:
        single = isinstance(example_inputs, Tensor)
        inputs = (example_inputs,) if single else tuple(example_inputs)
        explainable.prepare(*inputs)
    return explainable


class ExplainableModule(nn.Module):
    """A model that can be explained; made by :func:`make_explainable`.

    Attributes
    ----------
    observe, attribute : fx.GraphModule
        The two graphs of the latest capture. ``print(explainable.attribute.code)`` shows what was
        rewritten.
    """

    def __init__(self, model: nn.Module, output: Selector = None) -> None:
        super().__init__()
        self.held = _Held(model)
        self.probe = nn.Identity()
        self.output = output
        self.training = model.training
        self._engines: dict[Any, _Engine] = {}

    @property
    def model(self) -> nn.Module:
        """The user's own model."""
        return self.held.model

    @property
    def observe(self) -> fx.GraphModule:
        """The captured graph, which also returns its taps."""
        return self._latest().rewritten.observe

    @property
    def attribute(self) -> fx.GraphModule:
        """The captured graph with its nonlinear nodes rewritten."""
        return self._latest().rewritten.attribute

    def forward(self, *inputs: Tensor, **kwargs: Any) -> Tensor:
        """Return the model's own output; give SHAP multipliers for gradients when it asks."""
        if not is_asking(self.probe, inputs):
            remove_hooks((self.held, self.probe))
            self._check_dtypes(inputs)
            result = select_output(self.model(*inputs, **kwargs), self.output)
            require_rows(result, inputs)
            return result
        with self._cleaning():
            return self._explain(inputs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; not when SHAP does it, which is not about to train."""
        if not is_hooked(self.probe):
            super().zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engines": {}}  # a copy captures its own model

    def prepare(self, *inputs: Tensor) -> Self:
        """Capture and rewrite the model, in evaluation mode, for inputs like these.

        Parameters
        ----------
        *inputs : Tensor
            One tensor an input of the model, with the batch first.
        """
        self._check_dtypes(inputs)
        with evaluating(self.model):
            self._engine(inputs)
        return self

    def _explain(self, joint: Sequence[Tensor]) -> Tensor:
        self._check_dtypes(joint)
        rows = len(joint[0])
        if rows % 2 or any(len(x) != rows for x in joint):
            raise InputError(
                "samples and references come in pairs, but the inputs have "
                f"{', '.join(str(len(x)) for x in joint)} rows"
            )
        samples, references = ([x.detach().chunk(2)[half] for x in joint] for half in (0, 1))
        asked = tuple(self.probe._backward_hooks)  # SHAP hooks anew for every explanation
        walk, output = self._engine(references).explain(samples, references, asked)

        def guarded(grad: Tensor) -> list[Tensor]:
            with self._cleaning():
                return walk(grad)

        return explained(guarded, output, joint)

    @contextmanager
    def _cleaning(self) -> Iterator[None]:
        """Remove SHAP's hooks if anything fails; SHAP does so only when all goes well."""
        try:
            yield
        except BaseException:
            remove_hooks((self.held, self.probe))
            raise

    def _engine(self, inputs: Sequence[Tensor]) -> _Engine:
        modes = tuple((module, module.training) for module in self.model.modules())
        kind = (modes, *((x.shape[1:], x.dtype, x.device) for x in inputs))
        # A model that fixes its number of rows is captured once for each.
        keys = [(kind, None), (kind, len(inputs[0]))]
        key = next((key for key in keys if key in self._engines), None)
        if key is None:
            engine = _Engine(self.model, inputs, self.output)
            key = (kind, engine.captured.rows)
            self._engines[key] = engine
        self._engines[key] = self._engines.pop(key)  # the latest last
        return self._engines[key]

    def _latest(self) -> _Engine:
        if not self._engines:
            raise CaptureError(  # not an AttributeError, which nn.Module would swallow
                "the model is captured at the first explanation; call prepare(*inputs) before it"
            )
        return next(reversed(self._engines.values()))

    def _check_dtypes(self, inputs: Sequence[Tensor]) -> None:
        for position, x in enumerate(inputs):
            if not isinstance(x, Tensor):
                raise InputError(f"input {position} is a {type(x).__name__}, not a torch.Tensor")
            if not x.is_floating_point():
                raise InputError(
                    f"input {position} is of {x.dtype}; only floating-point inputs have "
                    "attributions. Cast features with .float(); for token ids explain the "
                    "embeddings (inputs_embeds)"
                )
        wanted = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        found = {x.dtype for x in inputs if isinstance(x, Tensor)}
        if len(wanted) == 1 and found and not found & wanted:
            raise InputError(
                f"the inputs are of {found.pop()} but the model's weights of {wanted.pop()}; cast "
                "samples and background to the dtype of the model"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back; no method of the model is called."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Held(nn.Module):
    """The user's model, out of reach of those who hook every leaf they find among the children.

    SHAP hooks leaves, and deletes attributes `x` and `y` of modules afterwards. It stops here,
    since this module shows no children; what PyTorch itself does to children is passed on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(())

    def train(self, mode: bool = True) -> Self:
        self.model.train(mode)
        return super().train(mode)

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        self.model.apply(fn)
        return super().apply(fn)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.model._apply(fn, recurse)
        return self


class _Engine:
    """One capture of the model and the tape of its latest references."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], output: Selector) -> None:
        self.model = model
        self.captured: Captured = capture(model, inputs, output)
        self.rewritten: Rewritten = rewrite(self.captured)
        self.layout: Layout | None = None
        self.tape: Tape | None = None
        self.tape_key: tuple[Any, ...] = ()
        self.version: tuple[Any, ...] = ()
        self.asked: Hashable = None
        self.sums: tuple[complex, ...] = ()

    def explain(
        self, samples: Sequence[Tensor], references: Sequence[Tensor], asked: Hashable
    ) -> tuple[Walk, Tensor]:
        """Return the walk of the tape that gives multipliers, and the outputs of both ends.

        `asked` tells one explanation, of many calls, from the next.
        """
        version = self.bind_weights(asked)
        tape = self.tape_of(references, version)
        rows = len(references[0])
        alone = all(bool((x == x[:1]).all()) for x in samples)
        require_finite("sample", [x[:1] for x in samples] if alone else samples)
        if self.layout is None:
            self.layout = probe_layout(
                self.rewritten.observe,
                [torch.cat([r[:1], x[:1]]) for r, x in zip(references, samples, strict=True)],
                self.captured.rows,
            )
        layout = self.layout
        single = alone and not layout.tile
        with torch.no_grad():
            y_sample, taps = self.rewritten.observe(*[x[:1] if single else x for x in samples])
        taps = layout.spread(taps, rows) if single else taps
        sample = dict(zip(self.rewritten.taps, taps, strict=True))
        output = torch.cat([y_sample.expand(rows, -1), tape.output.detach()])
        return partial(tape.walk, sample), output

    def tape_of(self, references: Sequence[Tensor], version: tuple[Any, ...]) -> Tape:
        """Return the tape of these references, recorded again when anything has changed."""
        same = (
            self.tape is not None
            and self.tape_key == version
            and all(
                old.shape == new.shape and torch.equal(old, new)
                for old, new in zip(self.tape.leaves, references, strict=True)
            )
        )
        if not same or self.tape is None:
            require_finite("references", references)
            self.tape = None  # let go of the old one first
            self.tape = Tape(self.rewritten.attribute, references)
            self.tape_key = version
        return self.tape

    def bind_weights(self, asked: Hashable) -> tuple[Any, ...]:
        """Point the graphs at the model's present weights; return what tells if they change."""
        weights = [tensor_at(self.model, path) for path in self.captured.weights.values()]
        if asked != self.asked:  # once an explanation: edits of `.data` leave the version alone
            self.asked, self.sums = asked, sums_of(weights)
        version = (*((weight.data_ptr(), weight._version) for weight in weights), self.sums)
        if version != self.version:
            self.version = version
            for name, weight in zip(self.captured.weights, weights, strict=True):
                for module in (self.rewritten.observe, self.rewritten.attribute):
                    setattr(module, name, weight.detach())
        return version


def sums_of(weights: Sequence[Tensor]) -> tuple[complex, ...]:
    """Return the sum of every tensor."""
    single = torch.float32
    return tuple(
        weight.detach().sum(dtype=torch.promote_types(weight.dtype, single)).item()
        for weight in weights
    )


def require_finite(what: str, inputs: Sequence[Tensor]) -> None:
    """Raise if samples or references contain NaN or infinity."""
    for position, x in enumerate(inputs):
        if not x.isfinite().all():
            row = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
            raise InputError(
                f"input {position} of the {what} contains NaN or infinity (row {row}), from which "
                "there is no difference to attribute; fill in or leave out such rows"
            )
