"""The public wrapper: behaves like the user's model, but gives SHAP multipliers as gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from typing_extensions import Self

from fxshap.calls import ModelCalls
from fxshap.errors import InputError, ModelError, OptionError
from fxshap.frontend.arguments import Call
from fxshap.frontend.entry import EntryPoint, nest_arguments
from fxshap.frontend.hook_point import Side, find_hook_point
from fxshap.frontend.naming import resolve_names
from fxshap.frontend.outputs import Selector
from fxshap.integrations.detect import active_library, calling_library, find_request
from fxshap.integrations.hooks import hook_keys, remove_stale_hooks
from fxshap.integrations.isolation import ProbedModule
from fxshap.report.report import Report, make_report, summarize_module
from fxshap.runtime.captures import CaptureCache
from fxshap.runtime.locks import explanation_lock, model_call
from fxshap.runtime.options import Options, ReferenceBatchSize, RuleName
from fxshap.runtime.refinement import Coalitions, Refinement


def make_explainable(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    output: Selector = None,
    input_names: str | Sequence[str] | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
    layer: str | nn.Module | None = None,
    unbatched: bool = False,
    rule: RuleName = "rescale",
    refine: Coalitions | Refinement = 0,
    reference_batch_size: ReferenceBatchSize = "auto",
    max_memory: int | None = None,
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
        Which tensor of the model's result is explained: a key or attribute name, an index of a
        tuple, an index into the second dimension of a tensor (a class, a time step), or a function
        of the result. It must be floating point, and for SHAP of shape (rows, outputs).
    input_names : str or sequence of str, optional
        What the inputs are to the model's ``forward``: parameters, such as ``"inputs_embeds"``, or
        entries of a dict, list or object that it takes, such as ``"batch.age"``, ``"series.0"`` or
        ``"data.x"``; only ``"age"`` where ``forward`` takes a single argument. By default the first
        parameters, or the items of a list if ``forward`` takes a single argument.
    forward_kwargs : mapping, optional
        Other arguments of the model, by name; see :meth:`ExplainableModule.bind`.
    layer : str or nn.Module, optional
        The layer whose output is explained instead of the model's inputs; see
        :meth:`ExplainableModule.split_at`. ``explainable.prefix(...)`` then returns that output.
    unbatched : bool
        Whether the model takes one sample, without a batch dimension: one graph, or one bag of
        instances. Inputs still have a row for each sample, for which the model is called by
        ``torch.vmap``.
    rule : "rescale" or "variance"
        How an activation treats the sum that it receives. ``"rescale"`` is DeepLIFT's rule
        (Shrikumar et al. 2017), averaged over references as in DeepSHAP (Lundberg and Lee 2017).
        ``"variance"`` uses how the sum varies over the coalitions of its inputs
        (``fxshap/rules/smoothed_activations.py``): as additive, much nearer to the exact Shapley
        values where activations follow linear layers, and two to three times as slow.
    refine : int, "exact", "auto" or Refinement
        How many complementary pairs of random half-coalitions of features to use for every
        reference (``fxshap/runtime/coalitions.py``). 0 is one pass; more pairs are nearer to the
        exact Shapley values, as additive, and take two to five passes each. ``"exact"`` gives the
        exact Shapley values, for up to 16 features or groups of features; ``"auto"`` what fits into
        a time. A :class:`Refinement` also has the seed, the limits and what a feature is.
    reference_batch_size : int or "auto"
        How many references share one tape. All of them is fastest; fewer take less memory and more
        time. By default as many as fit into `max_memory`.
    max_memory : int, optional
        How many bytes the tape of references may take, and in :class:`fxshap.DeepExplainer` the
        tape of a batch. By default half of the free memory of the device.
    compile : bool
        Whether ``torch.compile`` fuses the rules. The first explanation then takes longer, by
        seconds for a small network and minutes for one of fifty layers, and so does the first with
        another number of references; later ones are faster, most in transformers. It needs a C++
        compiler, or Triton on a GPU. Backgrounds that do not fit on one tape are not compiled.
    progress : bool
        Whether a capture, or the refinement of one sample, that takes more than 2 seconds shows a
        progress bar on a terminal or in a notebook.

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
        If an option has a value that it cannot have, or has no effect with another.
    CaptureError
        If `example_inputs` are given and the model cannot be captured with them.
    CompileError
        At the first explanation, if `compile` is set and there is no compiler.

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
    if layer is not None and input_names is not None:
        raise OptionError(
            "input_names has no effect with layer, whose output is explained instead of inputs; "
            "give one of the two"
        )
    names = (input_names,) if isinstance(input_names, str) else input_names
    entry = EntryPoint(
        None if names is None else resolve_names(model, names),
        None if layer is None else find_hook_point(model, layer, "output"),
        unbatched,
    )
    refinement = refine if isinstance(refine, Refinement) else Refinement(refine)
    options = Options(
        output, entry, rule, refinement, reference_batch_size, max_memory, compile, progress
    )
    bound = nest_arguments(model, forward_kwargs or {})
    explainable = ExplainableModule(ModelCalls(model, options, bound, CaptureCache(model)))
    if example_inputs is not None:
        single = isinstance(example_inputs, Tensor)
        explainable.capture(*((example_inputs,) if single else example_inputs))
    return explainable


class ExplainableModule(ProbedModule):
    """A model that can be explained; made by :func:`make_explainable`.

    Submodules and attributes of the user's model are reachable under their own names.
    """

    def __init__(self, calls: ModelCalls) -> None:
        super().__init__(calls.model)
        self._calls = calls

    def __getstate__(self) -> dict[str, Any]:
        captures = CaptureCache(self.original_model)  # a copy captures its own model
        return {
            **super().__getstate__(),
            "_calls": replace(self._calls, captures=captures, sharing={}),
        }

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Return the model's own output; if a library requests them, with multipliers."""
        probe, call = self._probe, Call.of(inputs, kwargs)
        remove_stale_hooks(self, self.original_model)
        guard = partial(self._removing_hooks_on_error, probe)
        with model_call(), guard():
            request = find_request(probe, self.original_model, call.leaves)
        if request is not None:
            with explanation_lock(), guard():
                return self._calls.explain(request, call, probe, guard)
        if calling_library() in (None, "shap") and hook_keys(probe):
            self._remove_hooks(probe)  # of a call that failed: SHAP has not hooked yet
        library = calling_library(directly=True)
        if library == "shap":
            with explanation_lock(), guard():
                return self._calls.prepare_for_shap(call)
        self._calls.shared(call)  # which may call the model, before other threads may capture
        with model_call():
            if library is not None:
                return self._calls.explained_output(call)
            return self._calls.output(call)

    # --- other views of the model ---------------------------------------------------------------

    def bind(self, **arguments: Any) -> ExplainableModule:
        """Bind arguments of the model that are not explained: the same for sample and reference.

        Parameters
        ----------
        **arguments
            By the names of the parameters of the model's ``forward``, or of the entries of the
            dict that it takes. A tensor of one row is repeated for every row of a call. A tensor
            with a row for every sample is paired with the samples in Captum, tangermeme and
            ordinary calls. SHAP does not tell which sample it explains, so there each sample needs
            an explainer of its own. A tensor without rows, such as the edges of a graph, is given
            to the model as it is. fxshap finds out which it is by calling the model, and
            ``fxshap.Shared(value)`` marks such a tensor.

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
        return ExplainableModule(self._calls.with_bound(arguments))

    def split_at(
        self, layer: str | nn.Module, side: Side = "output"
    ) -> tuple[Callable[..., Any], ExplainableModule]:
        """Split the model at a layer, and explain the part after it.

        Token models take integers, which have no attributions; their embeddings have.

        Parameters
        ----------
        layer : str or nn.Module
            The layer, or its qualified name, such as ``"bert.embeddings"``. The model must call it
            once.
        side : 'output' or 'input'
            Whether the suffix begins with what the layer returns or with what it takes.

        Returns
        -------
        prefix : callable
            Takes what the model takes and returns the tensor at the layer, or a tuple of several,
            without gradient.
        suffix : ExplainableModule
            Takes what `prefix` returns. Other arguments that the model needs, the ids themselves
            and masks, must be bound by name with :meth:`bind`.

        Raises
        ------
        InputError
            If the model has no such layer; at the first call, if the layer is not called exactly
            once, or the bound and the explained arguments have different shapes.

        Examples
        --------
        >>> import shap, torch, fxshap
        >>> class Bag(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embedding = torch.nn.Embedding(10, 4)
        ...     def forward(self, ids):
        ...         return torch.tanh(self.embedding(ids)).sum(1)
        >>> embed, suffix = fxshap.make_explainable(Bag()).split_at("embedding")
        >>> ids, padding = torch.tensor([[3, 1, 4]]), torch.tensor([[0, 0, 0]])
        >>> explainer = shap.DeepExplainer(suffix.bind(ids=ids), embed(padding))
        >>> explainer.shap_values(embed(ids)).sum(2).shape  # tokens, outputs
        (1, 3, 4)
        """
        entry = EntryPoint(hook_point=find_hook_point(self.original_model, layer, side))
        options = replace(self._calls.options, entry=entry)
        suffix = ExplainableModule(replace(self._calls, options=options))
        return suffix.prefix, suffix

    def prefix(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensor at the layer where the model was split; see :meth:`split_at`."""
        remove_stale_hooks(self, self.original_model)
        with explanation_lock():  # it changes the mode of the model for a while
            return self._calls.prefix(Call.of(args, kwargs))

    # --- captures -------------------------------------------------------------------------------

    def capture(self, *inputs: Tensor) -> Self:
        """Capture and rewrite the model, in evaluation mode, for inputs with the batch first.

        Raises
        ------
        InputError
            If there are no inputs, or they are not floating-point tensors.
        CaptureError
            If the model cannot be captured.
        """
        if not inputs:
            raise InputError("capture takes the inputs of the model, one tensor each")
        remove_stale_hooks(self, self.original_model)
        self._calls.capture(inputs)
        return self

    def clear_cache(self) -> None:
        """Free the memory that references take; the next explanation takes it again."""
        self._calls.captures.clear()

    @property
    def tapped_graph(self) -> fx.GraphModule:
        """The latest captured graph, which also returns what nonlinear operations receive."""
        return self._calls.captures.latest.program.rewritten.tapped_graph

    @property
    def rescaled_graph(self) -> fx.GraphModule:
        """The latest captured graph with its nonlinear operations rescaled; see its ``code``."""
        return self._calls.captures.latest.program.rewritten.rescaled_graph

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of lowest precision in which the model computes what depends on its input."""
        return self._calls.captures.latest.program.rewritten.compute_dtype

    @property
    def active_library(self) -> str:
        """The library that requests multipliers, such as 'shap'; 'plain' without a request."""
        return active_library(self._probe)

    def report(self) -> Report:
        """Report what was done to the model: which operations were rewritten, and by which rules.

        Returns
        -------
        Report
            ``print`` it for a table; ``report.draw(path)`` draws the graph.

        Raises
        ------
        CaptureError
            If the model is not captured yet: call ``capture(*inputs)`` first.

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
        rewritten = self._calls.captures.latest.program.rewritten
        return make_report(type(self.original_model).__name__, rewritten)

    def __repr__(self) -> str:
        report = self.report() if self._calls.captures.engines else None
        return summarize_module(type(self).__name__, self.original_model, report)
