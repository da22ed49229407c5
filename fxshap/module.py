"""What the user holds: a model that answers plainly, and to SHAP with multipliers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor, fx, nn

from fxshap.asking import is_asking, is_hooked, refuse_layers, remove_hooks
from fxshap.engine import Engine
from fxshap.errors import CaptureError, ModelError, OptionError
from fxshap.inputs import require_floats, split_pairs
from fxshap.output import Selector, require_rows, select_output
from fxshap.references import ReferenceChunk
from fxshap.refine import ONE_PASS, FeatureDims, Refinement
from fxshap.report import Report, make_report
from fxshap.tables import count
from fxshap.tape import explained

logger = logging.getLogger("fxshap")

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
    reference_chunk: ReferenceChunk = "auto",
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
    reference_chunk : int or "auto"
        How many references are kept on one tape. All of them is quickest; fewer take less memory
        and more time. By default as many as take half of the free memory.

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
    OptionError
        If `refine` is negative or `reference_chunk` is not positive.
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
    if reference_chunk != "auto" and (not isinstance(reference_chunk, int) or reference_chunk < 1):
        raise OptionError(f"reference_chunk is a number of rows or 'auto', not {reference_chunk!r}")
    explainable = ExplainableModule(model, output, refinement, reference_chunk)
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
        reference_chunk: ReferenceChunk = "auto",
    ) -> None:
        super().__init__()
        self.held = _Held(model)
        self.probe = nn.Identity()
        self.output = output
        self.refinement = refinement
        self.reference_chunk = reference_chunk
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

    def forward(self, *inputs: Tensor, **kwargs: Any) -> Tensor:
        """Return the model's own output; give SHAP multipliers for gradients when it asks."""
        if not is_asking(self.probe, inputs):
            remove_hooks((self.held, self.probe))
            require_floats(inputs, self.model)
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
        require_floats(inputs, self.model)
        with evaluating(self.model):
            self._engine(inputs)
        return self

    def release(self) -> None:
        """Free the memory that references take; the next explanation takes it again."""
        for engine in self._engines.values():
            engine.release()

    def report(self) -> Report:
        """Report what was done to the model: which operations were rewritten, and by which rules.

        Returns
        -------
        Report
            ``print`` it for a table; ``report.draw(path)`` draws the graph.

        Raises
        ------
        CaptureError
            If the model is not captured yet: call ``prepare(*inputs)`` first.

        Examples
        --------
        >>> import torch, fxshap
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU())
        >>> print(fxshap.make_explainable(model, torch.randn(2, 4)).report())
        Sequential, captured for (*, 4) float32
        1 node rewritten (1 by closed rules, 0 by the generic rule), 1 linear, 0 folded
        <BLANKLINE>
        operation nodes treatment rule                     modules
        gelu          1 closed    elementwise (gelu_slope) 1
        linear        1 linear                             0
        """
        return make_report(type(self.model).__name__, self._latest().rewritten)

    def __repr__(self) -> str:
        weights = sum(p.numel() for p in self.model.parameters())
        modules = sum(1 for _ in self.model.modules())
        title = f"ExplainableModule of {type(self.model).__name__}: "
        title += f"{count(modules, 'module')}, {weights:,} parameters"
        if self._engines:
            report = self.report()
            state, what = f"captured for {', '.join(report.inputs)}", report.summary
        else:
            state, what = "not captured yet", "the first explanation does it, or prepare(*inputs)"
        return f"{title}\n  {state}\n  {what}"

    def _explain(self, joint: Sequence[Tensor]) -> Tensor:
        refuse_layers(self.model)
        require_floats(joint, self.model)
        samples, references = split_pairs(joint)
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

    def _engine(self, inputs: Sequence[Tensor]) -> Engine:
        modes = tuple((module, module.training) for module in self.model.modules())
        kind = (modes, *((x.shape[1:], x.dtype, x.device) for x in inputs))
        # A model that fixes its number of rows is captured once for each.
        keys = [(kind, None), (kind, len(inputs[0]))]
        key = next((key for key in keys if key in self._engines), None)
        if key is None:
            engine = Engine(self.model, inputs, self.output, self.refinement, self.reference_chunk)
            key = (kind, engine.captured.rows)
            self._engines[key] = engine
        self._engines[key] = self._engines.pop(key)  # the latest last
        while len(self._engines) > MOST_ENGINES:
            del self._engines[next(iter(self._engines))]
            logger.debug("dropped the capture that was not asked for longest")
        return self._engines[key]

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
        self.model.apply(fn)
        return super().apply(fn)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.model._apply(fn, recurse)
        return self
