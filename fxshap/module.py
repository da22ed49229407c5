"""What the user holds: a model that answers plainly, and to SHAP with multipliers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxshap.arguments import Arguments
from fxshap.asking import (
    Question,
    caller,
    hooked_by,
    hooks_on,
    layer_asked,
    mode,
    needs_gradient,
    question,
    remove_hooks,
    works_for,
)
from fxshap.capture import capture
from fxshap.engine import Engine
from fxshap.errors import CaptureError, ModelError
from fxshap.inputs import is_floating, require_floats
from fxshap.layers import require_room, split
from fxshap.output import Selector, pick, require_columns, require_rows, select_output
from fxshap.place import Place
from fxshap.refine import ONE_PASS, FeatureDims, Refinement
from fxshap.tape import explained

#: Captures kept, one for each kind of inputs; the one not asked for longest goes first.
MOST_ENGINES = 8


def make_explainable(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    output: Selector = None,
    refine: int = 0,
    seed: int = 0,
    feature_dims: FeatureDims = None,
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
    refine : int
        How many complementary pairs of random half-coalitions of features to walk through for
        every reference. 0 is one pass; more are nearer to the exact Shapley values, as additive,
        and cost about five passes each.
    seed : int
        Seed of the coalitions: the same call gives the same values.
    feature_dims : sequence of int, or of one such sequence an input, optional
        With `refine`, the dimensions of an input, counted with the batch as 0, that index its
        features; what differs in other dimensions, such as the channels of a pixel or the
        embedding of a token, is one feature. By default (2, 3) for 4-d inputs, else all. For
        token embeddings of shape (rows, tokens, width) and one-hot sequences it is (1,) or (2,).

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
    ValueError
        If `refine` is negative.
    CaptureError
        If `example_inputs` are given and the model cannot be captured with them.

    Notes
    -----
    The multipliers are the rescale rule of DeepLIFT (Shrikumar et al. 2017) and its extensions,
    averaged over references as in DeepSHAP (Lundberg and Lee 2017). :mod:`fxshap.refine` describes
    the refinement.

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
    refinement = Refinement(refine, seed, feature_dims)
    explainable = ExplainableModule(model, output, refinement)
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

    def __init__(
        self,
        model: nn.Module,
        output: Selector = None,
        refinement: Refinement = ONE_PASS,
    ) -> None:
        super().__init__()
        self.held = _Held(model)
        self.probe = nn.ReLU()  # which all the libraries hook
        self.output = output
        self.refinement = refinement
        self.training = model.training
        self._engines: dict[Any, Engine] = {}

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

    @property
    def mode(self) -> str:
        """Who has prepared this model to ask it: 'shap', 'captum', ... 'paired', or 'plain'."""
        return mode(self.probe)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # As torch.compile's wrapper does it; private names are each module's own business.
            if name.startswith("_") or "held" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return the model's own output; multipliers for gradients if a library asks for them."""
        asked = question(self.probe, self.model, pytree.tree_leaves((inputs, kwargs)))
        if asked is not None:
            with self._cleaning():
                return self._explain(asked, inputs, kwargs)
        library = caller()
        if library in (None, "shap") and hooks_on(self.probe):
            self._remove_hooks()  # left over from a call that failed: SHAP has not yet hooked
        if library == "shap":
            with self._cleaning():
                return self._introduce(inputs)
        return pick(self.model(*inputs, **kwargs), self.output)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; not when SHAP does it, which is not about to train."""
        if not hooked_by(self.probe):
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
        require_floats(inputs, self.model)
        given = Arguments.of(inputs, {}, is_floating)
        with evaluating(self.model):
            self._engine(given, given.tensors)
        return self

    def _introduce(self, inputs: Sequence[Any]) -> Tensor:
        """Answer SHAP when it looks at the model that it is about to explain."""
        require_floats(inputs, self.model)
        layer = layer_asked(self.model, "shap")
        with layer.set_aside() if layer else nullcontext():
            result = select_output(self.model(*inputs), self.output)
            require_columns(result)
            require_rows(result, inputs)
            if layer:
                given = Arguments.of(inputs, {}, is_floating)
                engine = self._engine(given, given.tensors, layer.place)
                passing = engine.enter(given.tensors)[: engine.captured.explained]
                require_room(layer.place, passing, inputs)
        if layer:
            layer.hand_over(passing)
        return result

    def _explain(self, asked: Question, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Return the output for rows of samples and references, with multipliers to be had."""
        layer = asked.layer
        given = Arguments.of(inputs, kwargs, is_floating if layer else needs_gradient)
        require_floats(given.tensors[: given.explained], self.model)
        samples, references = given.halves()
        with layer.set_aside() if layer else nullcontext():
            engine = self._engine(given, references, layer.place if layer else None)
            samples, references = engine.enter(samples), engine.enter(references)
            # The libraries hook anew for every explanation.
            explanation = hooks_on(self.probe) or object()
            walk, output = engine.explain(samples, references, explanation)
        require_rows(output, given.tensors)

        def guarded(grad: Tensor) -> list[Tensor]:
            with self._cleaning():
                return walk(grad)

        if layer is None:
            return explained(guarded, output, given.tensors[: given.explained])
        pairs = zip(samples, references, strict=True)
        rows = [torch.cat(pair) for pair in pairs][: engine.captured.explained]
        return explained(guarded, output, layer.hand_over([x.requires_grad_() for x in rows]))

    @contextmanager
    def _cleaning(self) -> Iterator[None]:
        """Remove SHAP's hooks if anything fails; SHAP does so only when all goes well."""
        try:
            yield
        except BaseException:
            self._remove_hooks()
            raise

    def _remove_hooks(self) -> None:
        remove_hooks([self.held, self.probe, *self.model.modules()])

    def _engine(
        self, given: Arguments, inputs: Sequence[Tensor], place: Place | None = None
    ) -> Engine:
        """Return the capture for arguments of this kind, made with these inputs if it is new."""
        modes = tuple((module, module.training) for module in self.model.modules())
        kind = (modes, place, given.kind)
        # A model that fixes its number of rows is captured once for each.
        keys = [(kind, None), (kind, len(inputs[0]))]
        key = next((key for key in keys if key in self._engines), None)
        if key is None:
            engine = self._captured(given, inputs, place)
            key = (kind, engine.captured.rows)
            self._engines[key] = engine
        self._engines[key] = self._engines.pop(key)  # the latest last
        while len(self._engines) > MOST_ENGINES:
            del self._engines[next(iter(self._engines))]
        return self._engines[key]

    def _captured(self, given: Arguments, inputs: Sequence[Tensor], place: Place | None) -> Engine:
        captured = capture(self.model, inputs, self.output, given.explained, given.form.call, place)
        if place is None:
            return Engine(self.model, captured, self.refinement)
        trunk, head = split(captured, place)
        trunk.require_separate_rows(self.model, inputs, head, given.explained)
        return Engine(self.model, head, self.refinement, trunk)

    def _latest(self) -> Engine:
        if not self._engines:
            raise CaptureError(  # not an AttributeError, which nn.Module would swallow
                "the model is captured at the first explanation; call prepare(*inputs) before it"
            )
        return next(reversed(self._engines.values()))


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
        if not works_for(fn):
            self.model.apply(fn)
        return super().apply(fn)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.model._apply(fn, recurse)
        return self
