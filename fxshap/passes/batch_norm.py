"""Give every batch norm with running statistics one form, however it was captured.

The form is one operation of fxshap, which is linear in its input (:mod:`fxshap.ops.frozen` runs
it). torch infers the output of ``aten.batch_norm`` by running its decomposition, which takes two
fifths of the time of the export of a DenseNet; an operator of our own needs no decomposition.

A batch norm is decomposed into x scale + shift if it is not linear in its input, with all else
constant, or if the variances of sums are propagated through its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import call_args
from fxshap.ops.library import BATCH_NORM
from fxshap.passes.context import Context

aten = torch.ops.aten

#: Positions of arguments of ``aten.batch_norm``.
TRAINING, EPS = 5, 7


def unify_batch_norms(graph: fx.Graph, context: Context) -> fx.Graph:
    """Replace every batch norm with running statistics by one form, in place."""
    for node in list(graph.nodes):
        decompose = context.variances
        if node.target is BATCH_NORM:
            replace_batch_norm(node, node, node.args[-1], decompose)
        elif node.target is aten.batch_norm.default and not node.args[TRAINING]:
            replace_batch_norm(node, node, node.args[EPS], decompose)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            for output in list(node.users):
                if output.args[1] == 0:
                    replace_batch_norm(output, node, node.args[-1], decompose)
                else:
                    replace_statistics(output, node)
            graph.erase_node(node)
    return graph


def replace_statistics(output: fx.Node, norm: fx.Node) -> None:
    """Replace a statistic that a batch norm returns for training; in evaluation it is empty."""
    size = list(output.meta["val"].shape)
    with output.graph.inserting_before(output):
        empty = insert_call(
            output.graph, output, aten.new_zeros.default, (norm.args[0], size), meta=output.meta
        )
    output.replace_all_uses_with(empty)
    output.graph.erase_node(output)


def is_linear(norm: fx.Node) -> bool:
    """Return True if only the input of a batch norm varies, and all its types are the same."""
    x, weight, bias, mean, variance, *_ = call_args(norm)
    # The statistics may be in float32 when autocast has made the input half precision.
    same_dtype = bool(variance.meta["val"].dtype == x.meta["val"].dtype)
    statistics = [node for node in (weight, bias, mean, variance) if node is not None]
    return same_dtype and not any(node.meta["varying"] for node in statistics)


def replace_batch_norm(output: fx.Node, norm: fx.Node, eps: float, decompose: bool) -> None:
    """Replace `output` by a batch norm of the arguments of `norm`, decomposed if it must be."""
    arguments = (*call_args(norm)[:5], eps)
    with output.graph.inserting_before(output):
        if decompose or not is_linear(norm):
            result = decomposed_batch_norm(output, *arguments)
        else:
            result = insert_call(output.graph, output, BATCH_NORM, arguments, meta=output.meta)
    output.replace_all_uses_with(result)
    output.graph.erase_node(output)


def decomposed_batch_norm(
    output: fx.Node,
    x: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
    mean: fx.Node,
    variance: fx.Node,
    eps: float,
) -> fx.Node:
    """Write a batch norm as x scale + shift, with one scale and one shift per channel."""

    def call(target: Callable[..., Any], *args: Any, val: Any) -> fx.Node:
        return insert_call(output.graph, output, target, args, meta={"val": val})

    x_val, channel_val = x.meta["val"], variance.meta["val"]
    broadcastable = [-1] + [1] * (x_val.dim() - 2)
    per_channel = partial(call, val=channel_val)
    shaped = partial(call, val=channel_val.reshape(broadcastable))
    scale = per_channel(aten.rsqrt.default, per_channel(aten.add.Tensor, variance, eps))
    if weight is not None:
        scale = per_channel(aten.mul.Tensor, scale, weight)
    shift = per_channel(aten.mul.Tensor, per_channel(aten.neg.default, mean), scale)
    if bias is not None:
        shift = per_channel(aten.add.Tensor, shift, bias)
    scale, shift = (shaped(aten.reshape.default, part, broadcastable) for part in (scale, shift))
    scaled = call(aten.mul.Tensor, x, scale, val=x_val)
    result = call(aten.add.Tensor, scaled, shift, val=x_val)
    if channel_val.dtype != x_val.dtype:
        result = call(aten.to.dtype, result, x_val.dtype, val=x_val)
    return result
