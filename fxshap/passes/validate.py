"""Passes that change nothing and raise if a captured graph cannot be explained."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxshap.errors import CaptureError
from fxshap.graph.dataflow import value_dependents
from fxshap.graph.nodes import call_args, call_nodes, nodes_in, op_packet
from fxshap.graph.provenance import source_line, user_module
from fxshap.graph.symbols import free_unbacked_symbols
from fxshap.passes.context import Context
from fxshap.passes.densify_masks import READS
from fxshap.passes.sorted_rows import is_grouped_product
from fxshap.rules.core.registry import find_rule

aten = torch.ops.aten


def check_static(graph: fx.Graph, context: Context) -> fx.Graph:
    """Raise if the input's values become Python numbers or sizes, or regroup the rows."""
    constant = constant_sizes(graph)
    for node in call_nodes(graph):
        if node.meta["varying"] and (problem := dynamic_part(node, constant)) is not None:
            reason, remedy = problem
            raise CaptureError(
                f"the model cannot be captured as one graph: at {source_line(node)}, {reason}; "
                f"{remedy}"
            )
    return graph


def dynamic_part(node: fx.Node, constant: set[Any]) -> tuple[str, str] | None:
    """Return what in a node depends on values and must not, and a remedy; ``None`` if nothing.

    Parameters
    ----------
    node : fx.Node
        A node that depends on the input.
    constant : set of sympy.Symbol
        The unknown sizes that are the same for every input.
    """
    stay_static = (
        "stay in tensors of a fixed size, for example with torch.where or a product with a mask"
    )
    if op_packet(node) in (aten.item, aten._local_scalar_dense):
        reason = "it takes a number out of a tensor (`.item()`, `.tolist()`, `float()`)"
        return reason, stay_static
    if free_unbacked_symbols(node.meta.get("val")) - constant:
        reason = "the size of a tensor depends on values (as in `x[x > 0]` or `.nonzero()`)"
        return reason, stay_static
    if is_grouped_product(node):
        return (
            "it multiplies sorted rows in groups (`grouped_mm`), and does not put them back as it "
            "sorted them",
            "put them back by `out[order] = rows` or `rows[order.argsort()]`, or multiply row by "
            "row; a mixture of experts of transformers does after "
            'model.set_experts_implementation("batched_mm")',
        )
    return None


def constant_sizes(graph: fx.Graph) -> set[Any]:
    """Return the symbols of sizes that are unknown to torch but the same for every input.

    An example is the number of True elements of a constant mask.
    """
    constant: set[Any] = set()
    for node in call_nodes(graph):
        # How much is read at indices or a mask depends on these, and not on what is read.
        reads = op_packet(node) in (*READS, aten.masked_select)
        sources = nodes_in(call_args(node)[1]) if reads else node.all_input_nodes
        if not any(source.meta["varying"] for source in sources):
            constant |= free_unbacked_symbols(node.meta.get("val"))
    return constant


def check_deterministic(graph: fx.Graph, context: Context) -> fx.Graph:
    """Raise if the output depends on random numbers, and not only on their shape."""
    output = graph.output_node()
    for node in call_nodes(graph):
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded not in tags or find_rule(node.target) is not None:
            continue
        if output in value_dependents(graph, [node]):
            raise CaptureError(
                f"the model draws random numbers in {user_module(node) or 'its forward'}, at "
                f"{source_line(node)} ({node.target}), so it has no single output to explain; call "
                "model.eval(), or turn the sampling off"
            )
    return graph
