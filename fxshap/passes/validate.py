"""Checks that a captured graph can be explained."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from fxshap.errors import CaptureError
from fxshap.graph.nodes import call_nodes, op_packet
from fxshap.graph.provenance import source_line, user_module
from fxshap.passes.densify_masks import READS
from fxshap.rules.core.registry import find_rule

aten = torch.ops.aten


def check_static(graph: fx.Graph) -> None:
    """Raise if the input's values become Python numbers or sizes, or regroup the rows."""
    fixed = constant_sizes(graph)
    for node in call_nodes(graph):
        if not node.meta["varying"]:
            continue
        remedy = (
            "stay in tensors of a fixed size, for example with torch.where or a product with a mask"
        )
        if op_packet(node) in (aten.item, aten._local_scalar_dense):
            what = "it takes a number out of a tensor (`.item()`, `.tolist()`, `float()`)"
        elif free_unbacked_symbols(node.meta.get("val")) - fixed:
            what = "the size of a tensor depends on values (as in `x[x > 0]` or `.nonzero()`)"
        elif "grouped_mm" in str(node.target):
            what = "it sorts what is in the rows of the batch into groups, by values (`grouped_mm`)"
            remedy = (
                "multiply row by row; a mixture of experts of transformers does after "
                'model.set_experts_implementation("batched_mm")'
            )
        else:
            continue
        raise CaptureError(
            f"the model cannot be captured as one graph: at {source_line(node)}, {what}; {remedy}"
        )


def constant_sizes(graph: fx.Graph) -> set[Any]:
    """Return the sizes that are unknown to torch but the same for every input.

    How many places a constant mask holds, for one.
    """
    found: set[Any] = set()
    for node in call_nodes(graph):
        by_place = op_packet(node) in (*READS, aten.masked_select)
        sources = pytree.tree_leaves(node.args[1]) if by_place else node.all_input_nodes
        if not any(source.meta["varying"] for source in sources if isinstance(source, fx.Node)):
            found |= free_unbacked_symbols(node.meta.get("val"))
    return found


def check_deterministic(graph: fx.Graph) -> None:
    """Raise if what depends on the input is mixed with random numbers."""
    for node in call_nodes(graph):
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and find_rule(node.target) is None:
            raise CaptureError(
                f"the model draws random numbers in {user_module(node) or 'its forward'}, at "
                f"{source_line(node)} ({node.target}), so it has no single output to explain; call "
                "model.eval(), or turn the sampling off"
            )
