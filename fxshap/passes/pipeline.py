"""Rewrite: from one captured graph to two, `tapped_graph` and `rescaled_graph`.

- ``tapped_graph(*inputs) -> (output, taps)`` is the captured graph, returning as well what every
  nonlinear node that depends on the input receives (its *taps*).
- ``rescaled_graph(endpoints, *inputs) -> output`` is the captured graph in which every such node is
  a :func:`fxshap.autograd.rescale.rescale`.

Nodes that are linear in what depends on the input stay themselves: autograd is right for them.
Each pass is a function from graph to graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxshap.capture.captured import Captured
from fxshap.graph.dataflow import explained_inputs, mark_varying, value_dependents
from fxshap.passes.batch_norm import unify_batch_norms
from fxshap.passes.canonicalize import drop_identities, reshape_views, sort_topk
from fxshap.passes.densify_masks import densify_masked_ops
from fxshap.passes.duplicate_writes import resolve_duplicate_writes
from fxshap.passes.fold_constants import fold_constants
from fxshap.passes.insert_rescale import (
    insert_rescale,
    return_taps,
    use_frozen_kernels,
)
from fxshap.passes.promote_float64 import lowest_precision, promote_to_float64
from fxshap.passes.propagate_variances import (
    measure_variances,
    propagate_variances,
    restore_activations,
)
from fxshap.passes.relax_booleans import relax_booleans
from fxshap.passes.validate import check_deterministic, check_static

aten = torch.ops.aten


@dataclass(frozen=True)
class RewrittenModel:
    """The two rewritten graphs and what passes between and into them.

    Attributes
    ----------
    tapped_graph : fx.GraphModule
        ``tapped_graph(*inputs) -> (output, taps)``.
    rescaled_graph : fx.GraphModule
        ``rescaled_graph(endpoints, *inputs) -> output``.
    tap_names : tuple of str
        The names of the taps, in the order `tapped_graph` returns them.
    constants : fx.GraphModule
        Computes from the weights what does not depend on the input, once for each state of them.
    folded : tuple of str
        The attributes of the other graphs that hold what `constants` returns.
    variance_graph : fx.GraphModule or None
        ``variance_graph(reference, sample, *inputs)`` returns, for the taps of both endpoints, the
        variances that activations receive; ``None`` if no activation receives one.
    variance_tap_names : tuple of str
        The names of the taps that are variances, in the order `variance_graph` returns them.
    masked_graph : fx.GraphModule or None
        The captured graph, if it computes something only where a mask that depends on the input is
        True. The other graphs compute that everywhere.
    compute_dtype : torch.dtype
        The least precise type in which the model computes what depends on its input.
    """

    tapped_graph: fx.GraphModule
    rescaled_graph: fx.GraphModule
    tap_names: tuple[str, ...]
    constants: fx.GraphModule
    folded: tuple[str, ...]
    variance_graph: fx.GraphModule | None
    variance_tap_names: tuple[str, ...]
    masked_graph: fx.GraphModule | None
    compute_dtype: torch.dtype

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Point all graphs at these weights and compute the constants anew."""
        folded = [self.tapped_graph, self.rescaled_graph]
        if self.variance_graph is not None:
            folded.append(self.variance_graph)
        others = [g for g in (self.constants, self.masked_graph) if g is not None]
        for name, weight in weights.items():
            for module in (*folded, *others):
                setattr(module, name, weight.detach())
        with torch.no_grad():
            values = self.constants()
        for name, value in zip(self.folded, values, strict=True):
            for module in folded:
                setattr(module, name, value)


def rewrite(captured: Captured, variances: bool = False) -> RewrittenModel:
    """Build the two graphs of a captured model.

    Parameters
    ----------
    captured : Captured
    variances : bool
        Whether activations receive the variances of the sums before them.
    """
    graph = fx.Graph()
    output = graph.graph_copy(captured.module.graph, {})
    graph.output(output)
    graph = drop_identities(graph)
    varying = value_dependents(graph, explained_inputs(graph))
    computed_in = lowest_precision(varying, input_dtype(graph))
    graph = promote_to_float64(graph, varying)
    varying = value_dependents(graph, explained_inputs(graph))
    masked = densify_masked_ops(graph, varying)
    graph = unify_batch_norms(graph, varying, apart=variances)
    graph = mark_varying(sort_topk(graph))
    check_static(graph)
    graph = resolve_duplicate_writes(graph)
    graph = reshape_views(relax_booleans(graph, input_dtype(graph)))
    check_deterministic(graph)
    if variances:
        graph = propagate_variances(graph)

    constants, folded = fold_constants(graph)
    attribute, taps, variance_taps = insert_rescale(graph)
    observe, attribute = return_taps(graph, taps), use_frozen_kernels(attribute)
    measure = None
    if variance_taps:
        observe = restore_activations(observe)
        measure = measure_variances(attribute, variance_taps)
    root = captured.module
    for name in folded:  # a place for what `bind` computes
        setattr(root, name, torch.empty(0))
    rewritten = RewrittenModel(
        fx.GraphModule(root, use_frozen_kernels(observe), "Observe"),
        fx.GraphModule(root, attribute, "Attribute"),
        taps,
        fx.GraphModule(root, constants, "Constants"),
        folded,
        None if measure is None else fx.GraphModule(root, measure, "Variances"),
        variance_taps,
        captured.module if masked else None,
        computed_in,
    )
    rewritten.bind({})
    return rewritten


def input_dtype(graph: fx.Graph) -> torch.dtype:
    """Return the floating-point type of the first input that has one."""
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    return next((v.dtype for v in values if v.is_floating_point()), torch.get_default_dtype())


# --- passes -------------------------------------------------------------------------------------
