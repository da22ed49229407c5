"""Rewrite a captured graph: run the passes, and build the graphs that an explanation runs.

- ``tapped_graph(*inputs) -> (output, taps)`` is the captured graph, and also returns what every
  nonlinear node that depends on the input receives (its *taps*).
- ``output_graph(*inputs) -> output`` returns the output only.
- ``rescaled_graph(endpoints, *inputs) -> output`` is the captured graph in which every such node is
  a :func:`fxshap.autograd.rescale.rescale`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, fx

from fxshap.capture.captured import Captured
from fxshap.graph.dataflow import mark_varying
from fxshap.graph.nodes import row_sizes
from fxshap.graph.symbols import free_symbols
from fxshap.passes.batch_norm import unify_batch_norms
from fxshap.passes.canonicalize import (
    drop_identities,
    fix_squeezed_dims,
    reshape_views,
    sort_topk,
)
from fxshap.passes.complex_writes import split_complex_writes
from fxshap.passes.context import Context, Pass
from fxshap.passes.copy_strided import copy_strided
from fxshap.passes.densify_masks import densify_masked_ops
from fxshap.passes.duplicate_writes import resolve_duplicate_writes
from fxshap.passes.fold_constants import fold_constants
from fxshap.passes.insert_rescale import (
    insert_rescale,
    return_taps,
    use_frozen_kernels,
    use_frozen_linears,
    without_taps,
)
from fxshap.passes.join_selects import join_selects
from fxshap.passes.promote_float64 import promote_to_float64, record_compute_dtype
from fxshap.passes.propagate_variances import (
    build_variance_graph,
    propagate_variances,
    remove_variances,
    without_shifts,
)
from fxshap.passes.relax_booleans import relax_booleans
from fxshap.passes.separate_rows import separate_rows
from fxshap.passes.split_listed_rows import split_listed_rows
from fxshap.passes.unsort_rows import unsort_rows
from fxshap.passes.validate import check_deterministic, check_static

#: The passes, in the order in which they run.
PASSES: tuple[Pass, ...] = (
    copy_strided,  # before copies are dropped
    drop_identities,
    separate_rows,
    split_listed_rows,
    unsort_rows,
    record_compute_dtype,  # before promotion: it is the model's own
    promote_to_float64,
    densify_masked_ops,  # before `check_static`, which rejects what is still masked
    unify_batch_norms,
    fix_squeezed_dims,
    sort_topk,
    check_static,
    split_complex_writes,
    resolve_duplicate_writes,
    relax_booleans,
    reshape_views,  # after all passes that may add views
    check_deterministic,
    propagate_variances,
)


@dataclass(frozen=True)
class RewrittenModel:
    """The graphs that an explanation runs, and the names of what passes between them.

    Attributes
    ----------
    tapped_graph : fx.GraphModule
        ``tapped_graph(*inputs) -> (output, taps)``.
    output_graph : fx.GraphModule
        ``output_graph(*inputs) -> output``, which stores no taps.
    rescaled_graph : fx.GraphModule
        ``rescaled_graph(endpoints, *inputs) -> output``.
    tap_names : tuple of str
        The names of the taps, in the order `tapped_graph` returns them.
    constants : fx.GraphModule
        Computes from the weights what does not depend on the input, once for each state of them.
    folded : tuple of str
        The attributes of the other graphs that store what `constants` returns.
    variance_graph : fx.GraphModule or None
        ``variance_graph(reference, sample, *inputs)`` returns, for the taps of both endpoints, the
        variances and shifts that activations receive; ``None`` if no activation receives one.
    variance_tap_names : tuple of str
        The names of the taps that are moments, in the order `variance_graph` returns them.
    masked_graph : fx.GraphModule or None
        The captured graph, if it computes something only where a mask that depends on the input is
        True. The other graphs compute that at all positions.
    shared_graph : fx.GraphModule or None
        ``shared_graph(*inputs) -> (output, ())`` is the captured graph, if it computes something
        from all rows. The other graphs compute that from each row.
    compute_dtype : torch.dtype
        The least precise type in which the model computes what depends on its input.
    """

    tapped_graph: fx.GraphModule
    output_graph: fx.GraphModule
    rescaled_graph: fx.GraphModule
    tap_names: tuple[str, ...]
    constants: fx.GraphModule
    folded: tuple[str, ...]
    variance_graph: fx.GraphModule | None
    variance_tap_names: tuple[str, ...]
    masked_graph: fx.GraphModule | None
    shared_graph: fx.GraphModule | None
    compute_dtype: torch.dtype

    @cached_property
    def has_ragged_taps(self) -> bool:
        """Whether a tap has other numbers of elements for some rows, as ``h[bound_mask]`` has."""
        graph = self.tapped_graph.graph
        sizes = {free for size in row_sizes(graph) for free in free_symbols(size)}
        _, taps = cast("tuple[fx.Node, Sequence[fx.Node]]", graph.output_node().args[0])
        return not all(sizes & free_symbols(tap.meta["val"].shape) for tap in taps)

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Point all graphs at these weights and compute the constants again."""
        graphs = [
            self.tapped_graph,
            self.output_graph,
            self.rescaled_graph,
            self.variance_graph,
        ]
        with_constants = [graph for graph in graphs if graph is not None]
        captured = (self.masked_graph, self.shared_graph)
        others = [self.constants, *(graph for graph in captured if graph is not None)]
        for name, weight in weights.items():
            for module in (*with_constants, *others):
                setattr(module, name, weight.detach())
        with torch.no_grad():
            values = self.constants()
        for name, value in zip(self.folded, values, strict=True):
            for module in with_constants:
                setattr(module, name, value)


def rewrite(captured: Captured, variances: bool = False) -> RewrittenModel:
    """Run the passes on a captured model and build its graphs.

    Parameters
    ----------
    captured : Captured
        Not changed.
    variances : bool
        Whether activations receive the variances of the sums before them.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(captured.module.graph, {}))
    context = Context(input_dtype(graph), variances)
    for apply_pass in PASSES:
        graph = apply_pass(mark_varying(graph), context)
    return build_graphs(captured.module, mark_varying(graph), context)


def input_dtype(graph: fx.Graph) -> torch.dtype:
    """Return the floating-point type of the first input that has one."""
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    return next((v.dtype for v in values if v.is_floating_point()), torch.get_default_dtype())


def build_graphs(root: fx.GraphModule, graph: fx.Graph, context: Context) -> RewrittenModel:
    """Build the graphs of a model from the graph that the passes give.

    Parameters
    ----------
    root : fx.GraphModule
        The captured graph, with the weights.
    graph : fx.Graph
        Changed in place.
    context : Context
        What the passes reported.
    """
    constants, folded = fold_constants(graph)
    for name in folded:  # `bind` computes the values
        setattr(root, name, torch.empty(0))
    rescaled, tap_names, variance_tap_names = insert_rescale(graph)
    tapped, rescaled = return_taps(graph, tap_names), use_frozen_kernels(rescaled)
    variance_graph = None
    if variance_tap_names:
        tapped = remove_variances(tapped)
        graph_of_variances = build_variance_graph(rescaled, variance_tap_names)
        variance_graph = fx.GraphModule(root, graph_of_variances, "Variances")
        rescaled = without_shifts(rescaled)
    tapped = use_frozen_kernels(tapped)
    rescaled = join_selects(use_frozen_linears(rescaled))
    shared_graph = None
    if context.separated:
        shared_graph = fx.GraphModule(root, return_taps(root.graph, ()), "Shared")
    rewritten = RewrittenModel(
        tapped_graph=fx.GraphModule(root, tapped, "Tapped"),
        output_graph=fx.GraphModule(root, without_taps(tapped), "Output"),
        rescaled_graph=fx.GraphModule(root, rescaled, "Rescaled"),
        tap_names=tap_names,
        constants=fx.GraphModule(root, constants, "Constants"),
        folded=folded,
        variance_graph=variance_graph,
        variance_tap_names=variance_tap_names,
        masked_graph=root if context.densified else None,
        shared_graph=shared_graph,
        compute_dtype=context.compute_dtype or context.input_dtype,
    )
    rewritten.bind({})
    return rewritten
