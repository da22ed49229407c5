"""Kernels of frozen layers: they save no input for backward, and use the fastest kernels.

The gradient of a convolution with respect to its input needs only the weight. Autograd saves the
input too, for a gradient of the weight that nothing requests. On the tape that would be half of
the memory.

On the CPU convolutions run in the channels-last layout, those over one dimension as if over two:
the kernels for that layout are up to ten times faster in the backward pass, and never much slower.
Elementwise operations keep the layout of their input, so it is changed once at the first
convolution.

Batch norm also saves its input needlessly: its gradient is the scale of each channel. The gradient
of a linear layer is a product with its weight, which :mod:`.matrices` computes by the
fastest library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fxshap.ops.matrices import multiply_rows

aten = torch.ops.aten

#: The convolutions that have a frozen kernel, with their spatial dimensions.
CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def frozen_convolution(
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
    apply: Callable[..., Tensor] = _FrozenConvolution.apply
    if dims > 1:
        return apply(x, weight, bias, *window, groups)
    window = [[neutral, *v] for neutral, v in zip((1, 0, 1), window, strict=True)]
    return apply(x.unsqueeze(2), weight.unsqueeze(2), bias, *window, groups).squeeze(2)


def channels_last(x: Tensor) -> Tensor:
    """Return a tensor of shape (batch, channels, ...) in the layout for kernels of its device."""
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim() - 2]) if x.is_cpu else x


class _FrozenConvolution(torch.autograd.Function):
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
        x = channels_last(x)
        ctx.layout, ctx.weight = (x.shape, x.stride()), weight
        ctx.window = (stride, padding, dilation, groups)
        output_padding = [0] * len(stride)
        out: Tensor = aten.convolution(
            x, weight, bias, stride, padding, dilation, False, output_padding, groups
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stride, padding, dilation, groups = ctx.window
        grad = channels_last(grad)
        like_x = grad.new_empty_strided(*ctx.layout)  # only its shape and layout are read
        (grad_x, _, _) = aten.convolution_backward(
            grad, like_x, ctx.weight, None, stride, padding, dilation, False,
            [0] * len(stride), groups, [True, False, False],
        )  # fmt: skip
        return (grad_x, *[None] * 6)


def frozen_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Normalize with constant statistics, by the model's own kernel and so with its rounding."""
    apply: Callable[..., Tensor] = _FrozenBatchNorm.apply
    return apply(x, weight, bias, mean, var, eps)


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
    ) -> Tensor:
        if ctx.needs_input_grad[0]:  # once for a tape, which serves many backward passes
            scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
            ctx.scale = scale.reshape(-1, *[1] * (x.dim() - 2))
        return functional.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad * ctx.scale, *[None] * 5)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ weight.T + bias``."""
    apply: Callable[..., Tensor] = _FrozenLinear.apply
    return apply(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return multiply_rows(grad, ctx.weight), None, None
