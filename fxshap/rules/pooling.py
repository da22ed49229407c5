"""Max pooling: the max game (:mod:`.maximum`) of every window, sliding or adaptive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxshap.rules.core.caching import cached_between
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Target, Tensors, rule
from fxshap.rules.maximum import max_multiplier, values_grad

aten = torch.ops.aten


def max_pool_backward(
    operation: Operation, r: Tensor, x: Tensor, grad: Tensor, windows: Tensor, dims: int
) -> Tensor:
    """Return the cotangent of the input of max pooling over the last `dims` dimensions.

    Parameters
    ----------
    operation : Operation
    r, x : Tensor
        Reference and sample.
    grad : Tensor
        Cotangent of the pooled values.
    windows : Tensor
        The indices into the flattened input that each output pools, of shape (outputs, window
        size). An index one past the end stands for padding.
    dims : int
        Number of pooled dimensions.
    """

    def multiplier() -> Tensor:
        padded = (F.pad(value.flatten(-dims), (0, 1), value=-math.inf) for value in (r, x))
        return max_multiplier(*(endpoint[..., windows] for endpoint in padded))

    window_grads = cached_between(operation, r, x, multiplier) * grad.flatten(-dims).unsqueeze(-1)
    size = math.prod(r.shape[-dims:]) + 1  # the last element stands for padding
    out = window_grads.new_zeros(*window_grads.shape[:-2], size)
    out.index_add_(-1, windows.flatten(), window_grads.flatten(-2))
    return out[..., :-1].reshape(r.shape)


@lru_cache(maxsize=256)
def pooling_windows(
    sizes: tuple[int, ...],
    outputs: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Return the indices of every sliding window into the flattened input.

    The shape of the result is (outputs, window size).
    """
    indices = [
        torch.arange(out)[:, None] * s - p + torch.arange(k) * d
        for out, k, s, p, d in zip(outputs, kernel, stride, padding, dilation, strict=True)
    ]
    return flatten_indices(sizes, indices)


@lru_cache(maxsize=256)
def adaptive_windows(sizes: tuple[int, ...], outputs: tuple[int, ...]) -> Tensor:
    """Return the indices of adaptive pooling: window i spans floor(i n/m) to ceil((i+1) n/m)."""
    indices = []
    for n, m in zip(sizes, outputs, strict=True):
        starts = [i * n // m for i in range(m)]
        stops = [-((i + 1) * n // -m) for i in range(m)]
        width = max(stop - s for s, stop in zip(starts, stops, strict=True))
        indices.append(
            torch.tensor(
                [[s + j if s + j < stop else n for j in range(width)]
                 for s, stop in zip(starts, stops, strict=True)]
            )
        )  # fmt: skip
    return flatten_indices(sizes, indices)


def flatten_indices(sizes: tuple[int, ...], indices: list[Tensor]) -> Tensor:
    """Combine the (outputs, window) indices of each dimension into those of the flattened input."""
    flat = torch.zeros(1, 1, dtype=torch.long)
    inside = torch.ones(1, 1, dtype=torch.bool)
    for size, index in zip(sizes, indices, strict=True):
        valid = (index >= 0) & (index < size)
        flat = (flat[:, None, :, None] * size + index[None, :, None, :]).flatten(2).flatten(0, 1)
        inside = (inside[:, None, :, None] & valid[None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.where(inside, flat, math.prod(sizes))


def per_dim(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    """Return one number for each pooled dimension; a single one is repeated."""
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * length if len(values) == 1 else values)


def max_pool_rule(dims: int, *targets: Target) -> None:
    """Declare max pooling over `dims` dimensions, with or without indices."""

    @rule(*targets, name="max_pool")
    def max_pool(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Any
    ) -> tuple[Tensor]:
        (r,), (x,) = reference, sample
        grad = values_grad(grad)
        kernel = per_dim(operation["kernel_size"], dims)
        windows = pooling_windows(
            tuple(r.shape[-dims:]),
            tuple(grad.shape[-dims:]),
            kernel,
            per_dim(operation["stride"] or kernel, dims),
            per_dim(operation["padding"], dims),
            per_dim(operation["dilation"], dims),
        ).to(r.device)
        return (max_pool_backward(operation, r, x, grad, windows, dims),)


max_pool_rule(1, aten.max_pool1d, aten.max_pool1d_with_indices)
max_pool_rule(2, aten.max_pool2d, aten.max_pool2d_with_indices)
max_pool_rule(3, aten.max_pool3d, aten.max_pool3d_with_indices)


def adaptive_max_pool_rule(dims: int, *targets: Target) -> None:
    """Declare adaptive max pooling over `dims` dimensions."""

    @rule(*targets, name="adaptive_max_pool")
    def adaptive_max_pool(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Any
    ) -> tuple[Tensor]:
        (r,), (x,) = reference, sample
        grad = values_grad(grad)
        windows = adaptive_windows(tuple(r.shape[-dims:]), tuple(grad.shape[-dims:]))
        return (max_pool_backward(operation, r, x, grad, windows.to(r.device), dims),)


adaptive_max_pool_rule(1, aten.adaptive_max_pool1d)
adaptive_max_pool_rule(2, aten.adaptive_max_pool2d)
adaptive_max_pool_rule(3, aten.adaptive_max_pool3d)
