"""Batch norm with running statistics: recorded as one operation, then taken apart.

A pass turns it into x scale + shift, with constants a channel: a product with a constant keeps
nothing of x for the way back, and the constants are folded.

torch finds out what ``aten.batch_norm`` returns by running its decomposition, which takes two
fifths of the time of the export of a DenseNet. An operation of our own says it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

LIBRARY = torch.library.Library("fxshap", "FRAGMENT")
LIBRARY.define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps)"
    " -> Tensor"
)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Batch norm in evaluation mode."""
    return functional.batch_norm(x, mean, var, weight, bias, eps=eps)


LIBRARY.impl("batch_norm", batch_norm, "CompositeExplicitAutograd")
LIBRARY.impl("batch_norm", lambda x, *rest: torch.empty_like(x), "Meta")


def evaluated(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Stand in for ``torch.nn.functional.batch_norm``."""
    if training:
        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    out: Tensor = torch.ops.fxshap.batch_norm(input, weight, bias, running_mean, running_var, eps)
    return out


class OneBatchNorm(TorchFunctionMode):
    """Record batch norms in evaluation mode as the operation above."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        stands_in = evaluated if func is functional.batch_norm else func
        return stands_in(*args, **(kwargs or {}))


def affine_batch_norms(graph: fx.Graph) -> fx.Graph:
    """Take apart every batch norm that does not look at the batch."""
    for node in list(graph.nodes):
        if node.target is torch.ops.fxshap.batch_norm.default:
            replace(node, node, eps=node.args[-1])
        elif node.target is aten.batch_norm.default and not node.args[TRAINING]:
            replace(node, node, eps=node.args[EPS])
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            for output in list(node.users):
                if output.args[1] == 0:
                    replace(output, node, eps=node.args[-1])
                else:
                    replace_statistics(output, node)
            graph.erase_node(node)
    return graph


def replace_statistics(output: fx.Node, norm: fx.Node) -> None:
    """Put what is returned for training, and is empty, in the place of `output`."""
    graph, size = output.graph, list(output.meta["val"].shape)
    with graph.inserting_before(output):
        empty = graph.call_function(aten.new_zeros.default, (norm.args[0], size))
    empty.meta = dict(output.meta)
    output.replace_all_uses_with(empty)
    graph.erase_node(output)


#: Argument positions of ``aten.batch_norm``.
TRAINING, EPS = 5, 7


def replace(output: fx.Node, norm: fx.Node, eps: float) -> None:
    """Put in the place of `output` the batch norm of the arguments of `norm`."""
    graph = output.graph
    x, weight, bias, mean, variance, *_ = norm.args

    def call(target: Callable[..., Any], *args: Any, val: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {**output.meta, "val": val}
        return node

    assert isinstance(x, fx.Node) and isinstance(variance, fx.Node)
    val, one = x.meta["val"], variance.meta["val"]
    channels = [-1] + [1] * (val.dim() - 2)
    many = one.reshape(channels)
    with graph.inserting_before(output):
        scale = call(aten.rsqrt.default, call(aten.add.Tensor, variance, eps, val=one), val=one)
        if weight is not None:
            scale = call(aten.mul.Tensor, scale, weight, val=one)
        shift = call(aten.mul.Tensor, call(aten.neg.default, mean, val=one), scale, val=one)
        if bias is not None:
            shift = call(aten.add.Tensor, shift, bias, val=one)
        scale, shift = (
            call(aten.reshape.default, part, channels, val=many) for part in (scale, shift)
        )
        scaled = call(aten.mul.Tensor, x, scale, val=val)
        result = call(aten.add.Tensor, scaled, shift, val=val)
        if one.dtype != val.dtype:  # of statistics in float32 and what autocast made narrow
            result = call(aten.to.dtype, result, val.dtype, val=val)
        output.replace_all_uses_with(result)
    graph.erase_node(output)
