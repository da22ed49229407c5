"""Give operations contiguous arguments where the model does, if they may depend on strides.

The rewritten graphs drop copies, and frozen convolutions return another layout than the model's.
Most operations serve any strides. Those that read memory (``as_strided``) do not, and those without
a rule may not: ``matrix_exp`` raises, and a custom kernel may read the wrong numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxshap.graph.dataflow import IDENTITIES
from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import call_nodes, has_floating_output, op_packet, varying_arguments
from fxshap.passes.context import Context
from fxshap.rules.core.registry import find_rule

aten = torch.ops.aten

#: Operations that read the memory of their first argument, whatever its shape.
BY_MEMORY = (aten.as_strided, aten.as_strided_copy, aten.as_strided_scatter)


def copy_strided(graph: fx.Graph, context: Context) -> fx.Graph:
    """Make the arguments of operations that may depend on strides contiguous, as in the model."""
    for node in call_nodes(graph):
        if not may_depend_on_strides(node):
            continue
        # What reads memory counts from its start, where a contiguous slice may not be.
        copy = aten.clone.default if op_packet(node) in BY_MEMORY else aten.contiguous.default
        for source in {source for _, source in varying_arguments(node)}:
            if is_plain(source.meta.get("val")):
                with graph.inserting_before(node):
                    kwargs = {"memory_format": torch.contiguous_format}
                    copied = insert_call(graph, node, copy, (source,), kwargs)
                copied.meta["keep"] = True
                node.replace_input_with(source, copied)
    return graph


def may_depend_on_strides(node: fx.Node) -> bool:
    """Return True for operations that read memory, and for operators without a rule."""
    target: Any = node.target
    if op_packet(node) in BY_MEMORY:
        return True
    if op_packet(node) in IDENTITIES or not node.meta["varying"]:
        return False
    is_operator = isinstance(target, torch._ops.OpOverload)
    return is_operator and find_rule(target) is None and has_floating_output(node)


def is_plain(value: Any) -> bool:
    """Return True for a contiguous tensor at the start of its memory."""
    return isinstance(value, Tensor) and value.is_contiguous() and value.storage_offset() == 0
