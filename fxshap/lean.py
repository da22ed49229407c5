"""Convolutions with constant weights that keep nothing of their input for the way back.

The gradient of a convolution with respect to its input needs the weight alone, but autograd saves
the input too, for a gradient of the weight that nobody asks for. On the tape that would be half of
the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

#: Spatial dimensions of the convolutions that are made lean.
CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}


def lean_convolution(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """Convolve over `dims` dimensions; arguments as of ``aten.conv1d``, ``conv2d``, ``conv3d``."""
    window = [list(v) * (dims // len(v)) for v in (stride, padding, dilation)]
    apply: Callable[..., Tensor] = _LeanConvolution.apply
    return apply(x, weight, bias, *window, groups)


class _LeanConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        ctx.shape, ctx.weight, ctx.window = x.shape, weight, (stride, padding, dilation, groups)
        still = [0] * len(stride)
        out: Tensor = aten.convolution(
            x, weight, bias, stride, padding, dilation, False, still, groups
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stride, padding, dilation, groups = ctx.window
        shape_of_x = grad.new_empty(1).expand(ctx.shape)  # only its shape is read
        (grad_x, _, _) = aten.convolution_backward(
            grad, shape_of_x, ctx.weight, None, stride, padding, dilation, False,
            [0] * len(stride), groups, [True, False, False],
        )  # fmt: skip
        return (grad_x, *[None] * 6)
