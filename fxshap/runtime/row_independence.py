"""Checks that a row of a batch is computed alike wherever it is, and whatever the other rows are.

The same rows run next to another row, and in another order, at one number of rows. Kernels
round differently at another number, but hardly at another position. Where an output differs by more
than a few units in the last place, both runs are compared node by node. A deep network magnifies
rounding little by little. A node that differs although what it receives does not is to blame, and
the error names its line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxshap.errors import BatchMixingError
from fxshap.graph.dataflow import value_dependents
from fxshap.graph.nodes import is_floating_node, row_sizes, size_key
from fxshap.graph.provenance import UNKNOWN_LINE, source_line, user_module

#: Runs the rows of a batch: ``graph(*inputs) -> (output, taps)``.
TappedGraph = Callable[..., Any]

#: How many units in the last place of its largest element an output may differ by without a search
#: for the node to blame.
ROUNDING = 16

#: The tolerance at another number of rows, or in another order if no node is to blame. There other
#: kernels may run, whose rounding a deep network with random weights magnifies (to 0.17 in
#: EfficientNet-B6). A model that multiplies by the number of rows changes by half.
LOOSE_TOLERANCE = 0.4

MIXED = (
    "the rows of a batch influence each other in this model{where} (as in batch norm in training "
    "mode, or a softmax over dimension 0), so a row has no attributions of its own; call "
    "model.eval(), or reduce over the features instead of the batch"
)
MOVED = (
    "the position of a row in the batch, or what is in the rows before it, changes its "
    "output{where} (as in `x + table[:x.size(0)]` where the batch is the first dimension), so a "
    "row has no attributions of its own; index the dimension of the steps, as in "
    "`table[:x.size(1)]`"
)


@dataclass(frozen=True)
class Comparison:
    """Two runs in which some rows must come out alike.

    Attributes
    ----------
    before, after : sequence of Tensor
        The inputs of both runs.
    align : callable
        ``align(value, dim)`` returns the rows of the second run that are compared, in the order of
        the first, and ``select(value, dim)`` those of the first.
    select : callable
    message : str
        What is wrong if they differ, with `where` for the user's line.
    tolerance : float or None
        The tolerance if no node is to blame; ``None`` for half of the digits.
    same_order : bool
        Whether the compared rows are at the same positions in both runs, where kernels do not
        round differently.
    """

    before: Sequence[Tensor]
    after: Sequence[Tensor]
    select: Callable[[Tensor, int], Tensor]
    align: Callable[[Tensor, int], Tensor]
    message: str
    tolerance: float | None
    same_order: bool = True

    def difference(self, before: Tensor, after: Tensor, dim: int = 0) -> float:
        """Return the largest difference of the compared rows, relative to the largest element."""
        return relative_difference(self.select(before, dim), self.align(after, dim))


def first_row(value: Tensor, dim: int) -> Tensor:
    """Return the first row."""
    return value.narrow(dim, 0, 1)


def later_rows(value: Tensor, dim: int) -> Tensor:
    """Return all rows after the first."""
    return value.narrow(dim, 1, value.shape[dim] - 1)


def all_rows(value: Tensor, dim: int) -> Tensor:
    """Return all rows."""
    return value


def reversed_rows(value: Tensor, dim: int) -> Tensor:
    """Return all rows in the opposite order."""
    return value.flip(dim)


def with_other_rows(before: Sequence[Tensor], after: Sequence[Tensor]) -> Comparison:
    """Compare the first row of two batches in which only the later rows differ."""
    return Comparison(before, after, first_row, first_row, MIXED, None)


def with_another_first_row(before: Sequence[Tensor], after: Sequence[Tensor]) -> Comparison:
    """Compare the later rows of two batches in which only the first row differs.

    It may hold what influences all others, such as the largest element of all rows.
    """
    return Comparison(before, after, later_rows, later_rows, MIXED, None)


def in_another_order(inputs: Sequence[Tensor]) -> Comparison:
    """Compare a batch with the same rows in the opposite order."""
    after = [x.flip(0) for x in inputs]
    return Comparison(inputs, after, all_rows, reversed_rows, MOVED, LOOSE_TOLERANCE, False)


def check_comparison(graph: TappedGraph, comparison: Comparison, before: Tensor) -> None:
    """Raise a BatchMixingError if the output of a row depends on the rest of the batch.

    Parameters
    ----------
    graph : callable
        If it is a ``torch.fx.GraphModule``, the error names the line.
    comparison : Comparison
    before : Tensor
        The output of the first run.
    """
    after = graph(*comparison.after)[0]
    difference = comparison.difference(before, after)
    eps = torch.finfo(before.dtype).eps
    if difference <= ROUNDING * eps:
        return
    node = find_culprit(graph, comparison) if isinstance(graph, fx.GraphModule) else None
    tolerance = eps**0.5 if comparison.tolerance is None else comparison.tolerance
    if node is not None or difference > tolerance:
        raise BatchMixingError(comparison.message.format(where=location_of(node)))


def check_another_size(together: Tensor, separate: Tensor) -> None:
    """Raise a BatchMixingError if rows have other outputs together than separately."""
    if relative_difference(together, separate) > LOOSE_TOLERANCE:
        raise BatchMixingError(MIXED.format(where=""))


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest element of the first.

    NaN counts as 0, and infinity as the largest number, as they do not tell rows apart.
    """
    if not a.numel():
        return 0.0
    if not a.is_floating_point() and not a.is_complex():
        return 0.0 if torch.equal(a, b) else 1.0
    a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (a, b))
    a, b = (x.nan_to_num(0.0, 0.0, 0.0).double() for x in (a, b))
    largest = max(float(a.abs().max()), torch.finfo(torch.float32).tiny)
    return float((a - b).abs().max()) / largest


def location_of(node: fx.Node | None) -> str:
    """Return the user's module and line of a node, for a message."""
    if node is None or (line := source_line(node)) == UNKNOWN_LINE:
        return ""
    module = user_module(node)
    return f" in {module}, at {line}" if module else f", at {line}"


# --- which node ---------------------------------------------------------------------------------


class _Values(fx.Interpreter):
    """Runs a graph, and gives the value of every node to a function."""

    def __init__(self, graph: fx.GraphModule, visit: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(graph)
        self.visit = visit

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        self.visit(n, value)
        return value


class _ReachedError(Exception):
    """Stops a run of a graph at a node."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node


def find_culprit(graph: fx.GraphModule, comparison: Comparison) -> fx.Node | None:
    """Return the first node whose rows differ although those that it receives do not.

    Only nodes that depend on the inputs are compared, and none without a dimension of the batch and
    no integers, such as the positions of elements. Those differ as much as what they are computed
    from.
    """
    rows = row_sizes(graph.graph) or {len(comparison.before[0])}
    dependents = value_dependents(graph.graph, graph.graph.find_nodes(op="placeholder"))
    first: dict[fx.Node, Tensor] = {}
    differences: dict[fx.Node, float] = {}

    def store(node: fx.Node, value: Any) -> None:
        floating = node in dependents and is_floating_node(node)
        if floating and batch_dim_of(node, rows) is not None:
            first[node] = value

    def compare(node: fx.Node, value: Any) -> None:
        received = max((differences.get(n, 0.0) for n in node.all_input_nodes), default=0.0)
        differences[node] = received
        if node.op != "call_function" or node not in first:
            return
        dim = batch_dim_of(node, rows)
        difference = comparison.difference(first.pop(node), value, dim or 0)
        eps = torch.finfo(value.dtype).eps
        equal = comparison.same_order and not received
        rounding = ROUNDING * eps if equal else max(eps**0.5, received / eps**0.5)
        if difference > rounding:
            raise _ReachedError(node)
        differences[node] = max(difference, received)

    _Values(graph, store).run(*comparison.before)
    try:
        _Values(graph, compare).run(*comparison.after)
    except _ReachedError as reached:
        return reached.node
    return None


def batch_dim_of(node: fx.Node, sizes: set[Any]) -> int | None:
    """Return the first dimension of a node that counts the rows; ``None`` without one."""
    shape = node.meta["val"].shape
    return next((dim for dim, size in enumerate(shape) if size_key(size) in sizes), None)
