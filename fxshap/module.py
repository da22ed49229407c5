"""What the user holds: a model that answers plainly, and to SHAP with multipliers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import get_ident
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxshap.autograd.tape import with_multipliers
from fxshap.capture.export import capture
from fxshap.errors import CaptureError, InputError, ModelError, OptionError
from fxshap.frontend.arguments import Arguments
from fxshap.frontend.entry import (
    EntryPoint,
    check_parameters,
    check_single_row,
    expand_bound,
    has_rows,
    record_layer,
)
from fxshap.frontend.hook_point import HookPoint, Side, find_hook_point
from fxshap.frontend.inputs import check_dtypes, check_floating, check_numpy_dtypes
from fxshap.frontend.outputs import (
    Selector,
    check_rows,
    check_two_dimensional,
    pick_output,
    select_output,
)
from fxshap.frontend.signature import signature
from fxshap.integrations.detect import (
    Request,
    active_library,
    calling_library,
    find_request,
    needs_gradient,
    requested_layer,
)
from fxshap.integrations.hooks import remove_stale_hooks, hooking_libraries, hook_keys, remove_hooks
from fxshap.integrations.isolation import IsolatedModel, evaluation_mode
from fxshap.ops.dtypes import is_floating
from fxshap.passes.split_at_layer import check_tensor_count, split_at_hook_point
from fxshap.report.report import Report, make_report
from fxshap.report.tables import count
from fxshap.runtime.batching import check_prefix_rows
from fxshap.runtime.coalitions import ONE_PASS, FeatureDims, Refinement
from fxshap.runtime.engine import Engine
from fxshap.runtime.locks import capture_lock, explanation_lock, model_call
from fxshap.runtime.progress import progress_line
from fxshap.runtime.references import ReferenceBatchSize

logger = logging.getLogger("fxshap")

#: Captures kept, one for each kind of inputs; the one not asked for longest goes first.
MAX_CAPTURES = 8

FIRST = EntryPoint()


def make_explainable(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    output: Selector = None,
    inputs: str | Sequence[str] | None = None,
    bound: Mapping[str, Any] | None = None,
    from_layer: str | nn.Module | None = None,
    variances: bool = False,
    refine: int = 0,
    seed: int = 0,
    feature_dims: FeatureDims = None,
    reference_chunk: ReferenceBatchSize = "auto",
    compile: bool = False,
    progress: bool = True,
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
        Which tensor to explain of what the model returns: a key or attribute name, an index of a
        tuple, an index into the second dimension of a tensor (a class, a time step), or a function
        of the result. It must be floating point, and for SHAP of shape (rows, outputs).
    inputs : str or sequence of str, optional
        The parameters of the model's ``forward`` that are explained, such as ``"inputs_embeds"``.
        By default the first ones.
    bound : mapping, optional
        Other arguments of the model, by name; see :meth:`ExplainableModule.bind`.
    from_layer : str or nn.Module, optional
        The layer from whose output on to explain; see :meth:`ExplainableModule.from_layer`. What
        the layer gives is then had by ``explainable.embed(...)``.
    variances : bool
        Whether an activation takes into account how the sum that it receives varies over the
        coalitions of its inputs. This is as additive, much nearer to the exact Shapley values where
        activations follow linear layers, and not SHAP's own DeepLIFT any more.
        :mod:`fxshap.rules.smoothed_activations` has the formula.
    refine : int
        How many complementary pairs of random half-coalitions of features to walk through for
        every reference, or as many walks in longer chains of coalitions where they are many. 0 is
        one pass; more are nearer to the exact Shapley values, as additive, and cost about five
        passes each. :mod:`fxshap.runtime.coalitions` says how.
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
    compile : bool
        Whether ``torch.compile`` fuses the rules. The first explanation then takes longer, by
        seconds for a small network and minutes for one of fifty layers, and so does the first with
        another number of references; the others are quicker, most in transformers. It needs a C++
        compiler, or Triton on a GPU. References that do not fit onto one tape are walked without.
    progress : bool
        Whether a capture, or the refinement of one sample, that takes more than 2 seconds shows
        on a terminal or in a notebook that it is going on.

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
        If `example_inputs` are not floating-point tensors, or the model has no such parameters or
        layer.
    OptionError
        If `refine` is negative or `reference_chunk` is not positive.
    CaptureError
        If `example_inputs` are given and the model cannot be captured with them.
    CompileError
        At the first explanation, if `compile` is asked for and there is no compiler.

    Notes
    -----
    The multipliers are the rescale rule of DeepLIFT (Shrikumar et al. 2017) and its extensions,
    averaged over references as in DeepSHAP (Lundberg and Lee 2017).
    :mod:`fxshap.runtime.coalitions` describes the refinement.

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
    refinement = Refinement(refine, seed, feature_dims, progress, variances)
    if reference_chunk != "auto" and (not isinstance(reference_chunk, int) or reference_chunk < 1):
        raise OptionError(f"reference_chunk is a number of rows or 'auto', not {reference_chunk!r}")
    given = (inputs,) if isinstance(inputs, str) else inputs
    names = None if given is None else tuple(given)
    check_parameters(model, names or ())
    explainable = ExplainableModule(
        model, output, refinement, EntryPoint(names), reference_chunk, compile, progress
    ).bind(**bound or {})
    if from_layer is not None:
        _, explainable = explainable.from_layer(from_layer)
    if example_inputs is not None:
        single = isinstance(example_inputs, Tensor)
        explainable.prepare(*((example_inputs,) if single else example_inputs))
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
        entry: EntryPoint = FIRST,
        reference_chunk: ReferenceBatchSize = "auto",
        compile: bool = False,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.held = IsolatedModel(model)
        self.output = output
        self.refinement = refinement
        self.reference_chunk = reference_chunk
        self.compiled = compile  # `compile` is a method of every module
        self.progress = progress
        self.entry = entry
        self.bound: dict[str, Any] = {}
        self.training = model.training
        self._engines: dict[Any, Engine] = {}
        self._probes: dict[int, nn.Module] = {}

    @property
    def probe(self) -> nn.Module:
        """The module that is never run, which all the libraries hook: one for every thread."""
        thread = get_ident()
        if thread not in self._probes:
            self._probes[thread] = nn.ReLU()
        return self._probes[thread]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the children, which is how SHAP and Captum find the probe."""
        yield from super().named_children()
        yield "probe", self.probe

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over all modules, which is how tangermeme finds the probe."""
        yield from super().named_modules(memo, prefix, remove_duplicate)
        yield (f"{prefix}.probe" if prefix else "probe"), self.probe

    @property
    def model(self) -> nn.Module:
        """The user's own model."""
        return self.held.model

    @property
    def observe(self) -> fx.GraphModule:
        """The captured graph, which also returns its taps."""
        return self._latest().rewritten.tapped_graph

    @property
    def attribute(self) -> fx.GraphModule:
        """The captured graph with its nonlinear nodes rewritten."""
        return self._latest().rewritten.rescaled_graph

    @property
    def computed_in(self) -> torch.dtype:
        """The type with the fewest digits in which the model computes what depends on its input.

        The type of the input, or float32, float16 or bfloat16 where the model casts to that inside.
        """
        return self._latest().rewritten.compute_dtype

    @property
    def mode(self) -> str:
        """Who has prepared this model to ask it: 'shap', 'captum', ... 'paired', or 'plain'."""
        return active_library(self.probe)

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
        probe = self.probe
        remove_stale_hooks(self, self.model)
        with model_call():
            asked = find_request(probe, self.model, pytree.tree_leaves((inputs, kwargs)))
        if asked is not None:
            with explanation_lock(), self._cleaning(probe):
                return self._explain(asked, probe, inputs, kwargs)
        library = calling_library()
        if library in (None, "shap") and hook_keys(probe):
            self._remove_hooks(probe)  # left over from a call that failed: SHAP has not yet hooked
        if calling_library(directly=True) == "shap":
            with explanation_lock(), self._cleaning(probe):
                return self._introduce(inputs)
        with model_call():
            return pick_output(self._call(inputs, kwargs), self.output)

    def bind(self, **arguments: Any) -> ExplainableModule:
        """Bind arguments of the model that are not explained: the same for sample and reference.

        Parameters
        ----------
        **arguments
            By the names of the parameters of the model's ``forward``. A tensor of one row is
            repeated for every row of a call. A tensor with a row for every sample goes along with
            them in Captum, tangermeme and ordinary calls; SHAP compares one sample at a time
            with all references and does not say which, so there each sample needs an explainer
            of its own. Anything but a tensor is passed as it is.

        Returns
        -------
        ExplainableModule
            Of the same model, sharing its captures; this one stays as it is.

        Raises
        ------
        InputError
            If the model takes no such argument.

        Examples
        --------
        >>> import shap, torch, fxshap
        >>> class Scaled(torch.nn.Module):
        ...     def forward(self, x, unit):
        ...         return torch.tanh(x * unit[:, None])
        >>> explainable = fxshap.make_explainable(Scaled())
        >>> background, samples, units = torch.randn(9, 3), torch.randn(2, 3), torch.tensor([1, 60])
        >>> for x, unit in zip(samples.split(1), units.split(1)):
        ...     explainer = shap.DeepExplainer(explainable.bind(unit=unit), background)
        ...     print(explainer.shap_values(x).shape)
        (1, 3, 3)
        (1, 3, 3)
        """
        check_parameters(self.model, tuple(arguments))
        bound = self._variant(self.entry)
        bound.bound.update(arguments)
        return bound

    def from_layer(
        self, layer: str | nn.Module, side: Side = "output"
    ) -> tuple[Callable[..., Any], ExplainableModule]:
        """Cut the model at a layer, and explain from there on.

        Token models take integers, which have no attributions; their embeddings have.

        Parameters
        ----------
        layer : str or nn.Module
            The layer, or its qualified name, such as ``"bert.embeddings"``. The model must call it
            once.
        side : 'output' or 'input'
            Whether to begin with what the layer gives or with what it takes.

        Returns
        -------
        embed : callable
            Takes what the model takes and returns what passes there, a tensor or a tuple of
            several, without gradient.
        head : ExplainableModule
            Takes what `embed` returns. What else the model needs, the ids themselves, masks,
            must be bound by name with :meth:`bind`; of the ids only what the model makes of them
            beside the layer, such as the place of the padding, has a meaning then.

        Raises
        ------
        InputError
            If the model has no such layer; at the first call, if it is not called once, or what is
            bound and what is explained are not of one shape.

        Examples
        --------
        >>> import shap, torch, fxshap
        >>> class Bag(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embedding = torch.nn.Embedding(10, 4)
        ...     def forward(self, ids):
        ...         return torch.tanh(self.embedding(ids)).sum(1)
        >>> embed, head = fxshap.make_explainable(Bag()).from_layer("embedding")
        >>> ids, nothing = torch.tensor([[3, 1, 4]]), torch.tensor([[0, 0, 0]])
        >>> explainer = shap.DeepExplainer(head.bind(ids=ids), embed(nothing))
        >>> explainer.shap_values(embed(ids)).sum(2).shape  # tokens, outputs
        (1, 3, 4)
        """
        head = self._variant(EntryPoint(hook_point=find_hook_point(self.model, layer, side)))
        return head.embed, head

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """Return what passes the layer from which this model explains; see :meth:`from_layer`."""
        if self.entry.hook_point is None:
            raise ModelError("this model is explained from its inputs; cut it with from_layer(...)")
        remove_stale_hooks(self, self.model)
        given = signature(self.model).bind_partial(*args, **kwargs).arguments
        with model_call(), evaluation_mode(self.model):
            filled = self._filled(args, kwargs, taken=given)
            return record_layer(self.model, self.entry.hook_point, *args, **filled)

    def _variant(self, entry: EntryPoint) -> ExplainableModule:
        """Return another view of the same model that shares the captures."""
        variant = ExplainableModule(
            self.model,
            self.output,
            self.refinement,
            entry,
            self.reference_chunk,
            self.compiled,
            self.progress,
        )
        variant.bound = dict(self.bound)
        variant._engines = self._engines
        return variant

    def _filled(
        self,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        pairs: bool = False,
        taken: Collection[str] = (),
    ) -> dict[str, Any]:
        """Return the keyword arguments of a call with those that are bound and not taken."""
        bound = {k: v for k, v in self.bound.items() if k not in kwargs and k not in taken}
        like = next(filter(has_rows, pytree.tree_leaves((inputs, kwargs))), None)
        return {**(bound if like is None else expand_bound(bound, like, pairs)), **kwargs}

    def _call(self, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self.entry(self.model, *inputs, **self._filled(inputs, kwargs))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; not when SHAP does it, which is not about to train."""
        if not hooking_libraries(self.probe):
            super().zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        # A copy captures its own model, and nobody is asking it.
        return {**self.__dict__, "_engines": {}, "_probes": {}}

    def prepare(self, *inputs: Tensor) -> Self:
        """Capture and rewrite the model, in evaluation mode, for inputs like these.

        Parameters
        ----------
        *inputs : Tensor
            One tensor an input of the model, with the batch first.
        """
        if not inputs:
            raise InputError("prepare takes the inputs of the model, one tensor each")
        check_floating(inputs)
        remove_stale_hooks(self, self.model)
        with explanation_lock(), evaluation_mode(self.model):
            given = self._given(inputs, {}, is_floating)
            self._engine(given, given.tensors)
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
        operation nodes treatment                  modules
        gelu          1 closed: elementwise (gelu) 1
        linear        1 linear                     0
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

    def _introduce(self, inputs: Sequence[Any]) -> Tensor:
        """Answer SHAP when it looks at the model that it is about to explain."""
        check_floating(inputs)
        check_single_row(self.bound)
        layer = requested_layer(self.model, "shap")
        with layer.suspended() if layer else nullcontext():
            check_dtypes(inputs, self.model, lambda: self._call(inputs, {}))
            result = select_output(self._call(inputs, {}), self.output)
            check_numpy_dtypes(inputs, result)
            check_two_dimensional(result)
            check_rows(result, inputs)
            if layer:
                given = self._given(inputs, {}, is_floating)
                engine = self._engine(given, given.tensors, layer.hook_point)
                passing = engine.enter(given.tensors)[: engine.captured.explained]
                check_tensor_count(layer.hook_point, passing, inputs)
        if layer:
            layer.call_hook(passing)
        return result

    def _explain(
        self, asked: Request, probe: nn.Module, inputs: Sequence[Any], kwargs: dict[str, Any]
    ) -> Tensor:
        """Return the output for rows of samples and references, with multipliers to be had."""
        layer = asked.layer
        explains = is_floating if layer else needs_gradient
        given = self._given(inputs, kwargs, explains, pairs=True)
        check_floating(given.tensors[: given.explained])
        samples, references = given.halves()
        with layer.suspended() if layer else nullcontext():
            engine = self._engine(given, references, layer.hook_point if layer else None)
            samples, references = engine.enter(samples), engine.enter(references)
            # The libraries hook anew for every explanation.
            explanation = hook_keys(probe) or object()
            walk, output = engine.explain(samples, references, explanation)
        check_rows(output, given.tensors)

        def guarded(grad: Tensor) -> list[Tensor]:
            with explanation_lock(), self._cleaning(probe):
                return walk(grad)

        if layer is None:
            return with_multipliers(guarded, output, given.tensors[: given.explained])
        pairs = zip(samples, references, strict=True)
        rows = [torch.cat(pair) for pair in pairs][: engine.captured.explained]
        return with_multipliers(
            guarded, output, layer.call_hook([x.requires_grad_() for x in rows])
        )

    @contextmanager
    def _cleaning(self, probe: nn.Module) -> Iterator[None]:
        """Remove SHAP's hooks if anything fails; SHAP does so only when all goes well."""
        try:
            yield
        except BaseException:
            self._remove_hooks(probe)
            raise

    def _remove_hooks(self, probe: nn.Module) -> None:
        remove_hooks([self.held, probe, *self.model.modules()])

    def _given(
        self,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        explains: Callable[[Any], bool],
        pairs: bool = False,
    ) -> Arguments:
        """Take the arguments of a call apart; what is bound is never explained."""
        filled = self._filled(inputs, kwargs, pairs)
        bound = {id(filled[name]) for name in self.bound.keys() - kwargs.keys()}
        return Arguments.of(inputs, filled, lambda x: explains(x) and id(x) not in bound)

    def _engine(
        self, given: Arguments, inputs: Sequence[Tensor], place: HookPoint | None = None
    ) -> Engine:
        """Return the capture for arguments of this kind, made with these inputs if it is new."""
        modes = tuple((module, module.training) for module in self.model.modules())
        kind = (modes, self.entry, place, given.kind)
        # A model that fixes its number of rows is captured once for each.
        keys = [(kind, None), (kind, len(inputs[0]))]
        key = next((key for key in keys if key in self._engines), None)
        if key is None:
            engine = self._captured(given, inputs, place)
            key = (kind, engine.captured.rows)
            self._engines[key] = engine
        self._engines[key] = self._engines.pop(key)  # the latest last
        while len(self._engines) > MAX_CAPTURES:
            del self._engines[next(iter(self._engines))]
            logger.debug("dropped the capture that was not asked for longest")
        return self._engines[key]

    def _captured(
        self, given: Arguments, inputs: Sequence[Tensor], place: HookPoint | None
    ) -> Engine:
        form = given.form

        def call(model: nn.Module, tensors: Sequence[Tensor]) -> Any:
            return form.call(partial(self.entry, model), tensors)

        what = f"fxshap captures {type(self.model).__name__}, once for all inputs of this kind"
        with capture_lock(), progress_line(what, self.progress):
            # The tensors of a tracer do not mind types: it would capture what cannot run.
            check_dtypes(inputs, self.model, lambda: call(self.model, inputs))
            captured = capture(self.model, inputs, self.output, given.explained, call, place)
        trunk, head = None, captured
        if place is not None:
            trunk, head = split_at_hook_point(captured, place)
            check_prefix_rows(trunk, self.model, inputs, head, given.explained)
        return Engine(self.model, head, self.refinement, self.reference_chunk, trunk, self.compiled)

    def _latest(self) -> Engine:
        if not self._engines:
            raise CaptureError(  # not an AttributeError, which nn.Module would swallow
                "the model is captured at the first explanation; call prepare(*inputs) before it"
            )
        return next(reversed(self._engines.values()))
