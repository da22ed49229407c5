"""Batch norm with running statistics: recorded as one operation, which is linear in its input.

A pass gives it one form, however it was captured (:mod:`fxshap.ops.frozen` runs it), and takes
apart what is not linear in the input alone, or whose parts the variances follow: x scale + shift.

torch finds out what ``aten.batch_norm`` returns by running its decomposition, which takes two
fifths of the time of the export of a DenseNet. An operation of our own says it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx

from fxshap.ops.library import BATCH_NORM

aten = torch.ops.aten


def unify_batch_norms(
    graph: fx.Graph, varying: Container[fx.Node], apart: bool = False
) -> fx.Graph:
    """Give every batch norm that does not look at the batch one form, in place.

    Parameters
    ----------
    graph : fx.Graph
        A functional ATen graph.
    varying : container of fx.Node
        The nodes that depend on the input.
    apart : bool
        Whether to take all of them apart.
    """
    for node in list(graph.nodes):
        if node.target is BATCH_NORM:
            replace(node, node, node.args[-1], apart or not is_linear(node, varying))
        elif node.target is aten.batch_norm.default and not node.args[TRAINING]:
            replace(node, node, node.args[EPS], apart or not is_linear(node, varying))
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            for output in list(node.users):
                if output.args[1] == 0:
                    replace(output, node, node.args[-1], apart or not is_linear(node, varying))
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


def is_linear(norm: fx.Node, varying: Container[fx.Node]) -> bool:
    """Say whether a batch norm is linear in its input alone, and of one type."""
    x, weight, bias, mean, variance, *_ = norm.args
    assert isinstance(x, fx.Node) and isinstance(variance, fx.Node)
    # Statistics may be in float32 and what autocast made narrow not.
    one_type = variance.meta["val"].dtype == x.meta["val"].dtype
    return one_type and not any(node in varying for node in (weight, bias, mean, variance))


def replace(output: fx.Node, norm: fx.Node, eps: float, apart: bool) -> None:
    """Put in the place of `output` the batch norm of the arguments of `norm`."""
    x, weight, bias, mean, variance, *_ = norm.args
    with output.graph.inserting_before(output):
        if apart:
            result = decomposed_batch_norm(output, norm, eps)
        else:
            args = (x, weight, bias, mean, variance, eps)
            result = output.graph.call_function(BATCH_NORM, args)
            result.meta = dict(output.meta)
    output.replace_all_uses_with(result)
    output.graph.erase_node(output)


def decomposed_batch_norm(output: fx.Node, norm: fx.Node, eps: float) -> fx.Node:
    """Write a batch norm as x scale + shift, with constants a channel."""
    x, weight, bias, mean, variance, *_ = norm.args

    def call(target: Callable[..., Any], *args: Any, val: Any) -> fx.Node:
        node = output.graph.call_function(target, args)
        node.meta = {**output.meta, "val": val}
        return node

    assert isinstance(x, fx.Node) and isinstance(variance, fx.Node)
    val, one = x.meta["val"], variance.meta["val"]
    channels = [-1] + [1] * (val.dim() - 2)
    many = one.reshape(channels)
    scale = call(aten.rsqrt.default, call(aten.add.Tensor, variance, eps, val=one), val=one)
    if weight is not None:
        scale = call(aten.mul.Tensor, scale, weight, val=one)
    shift = call(aten.mul.Tensor, call(aten.neg.default, mean, val=one), scale, val=one)
    if bias is not None:
        shift = call(aten.add.Tensor, shift, bias, val=one)
    scale, shift = (call(aten.reshape.default, part, channels, val=many) for part in (scale, shift))
    scaled = call(aten.mul.Tensor, x, scale, val=val)
    result = call(aten.add.Tensor, scaled, shift, val=val)
    if one.dtype != val.dtype:
        result = call(aten.to.dtype, result, val.dtype, val=val)
    return result
