"""Checks that a captured graph can be explained."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from fxshap.errors import CaptureError
from fxshap.graph.nodes import calls, packet
from fxshap.graph.provenance import node_line, user_module
from fxshap.passes.densify_masks import READS
from fxshap.rules.core.registry import find_rule

aten = torch.ops.aten


def refuse_choices(graph: fx.Graph) -> None:
    """Raise if the input's values become Python numbers or sizes, or regroup the rows."""
    fixed = sizes_of_constants(graph)
    for node in calls(graph):
        if not node.meta["varying"]:
            continue
        remedy = (
            "stay in tensors of a fixed size, for example with torch.where or a product with a mask"
        )
        if packet(node) in (aten.item, aten._local_scalar_dense):
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
            f"the model cannot be captured as one graph: at {node_line(node)}, {what}; {remedy}"
        )


def sizes_of_constants(graph: fx.Graph) -> set[Any]:
    """Return the sizes that are unknown to torch but the same for every input.

    How many places a constant mask holds, for one.
    """
    found: set[Any] = set()
    for node in calls(graph):
        by_place = packet(node) in (*READS, aten.masked_select)
        sources = pytree.tree_leaves(node.args[1]) if by_place else node.all_input_nodes
        if not any(source.meta["varying"] for source in sources if isinstance(source, fx.Node)):
            found |= free_unbacked_symbols(node.meta.get("val"))
    return found


def refuse_randomness(graph: fx.Graph) -> None:
    """Raise if what depends on the input is mixed with random numbers."""
    for node in calls(graph):
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and find_rule(node.target) is None:
            raise CaptureError(
                f"the model draws random numbers in {user_module(node) or 'its forward'}, at "
                f"{node_line(node)} ({node.target}), so it has no single output to explain; call "
                "model.eval(), or turn the sampling off"
            )
