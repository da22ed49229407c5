"""Max pooling: the max game of every window."""

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
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.maximum import max_multiplier, values_grad

aten = torch.ops.aten


def over_windows(
    operation: Operation, r: Tensor, x: Tensor, grad: Tensor, windows: Tensor, dims: int
) -> Tensor:
    """Multiply through max pooling over the last `dims` dimensions.

    Parameters
    ----------
    operation : Operation
    r, x : Tensor
        Reference and sample.
    grad : Tensor
        Cotangent of the pooled values.
    windows : Tensor
        For every output place (rows) the places it pools in the flattened input; places outside
        the input are numbered one past its end.
    dims : int
        Number of pooled dimensions.
    """

    def multiplier() -> Tensor:
        ends = (F.pad(value.flatten(-dims), (0, 1), value=-math.inf) for value in (r, x))
        return max_multiplier(*(end[..., windows] for end in ends))

    shares = cached_between(operation, r, x, multiplier) * grad.flatten(-dims).unsqueeze(-1)
    places = math.prod(r.shape[-dims:]) + 1  # the last one lies outside the input
    out = shares.new_zeros(*shares.shape[:-2], places)
    out.index_add_(-1, windows.flatten(), shares.flatten(-2))
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
    """Flattened places of every sliding window: shape (number of outputs, window size)."""
    places = [
        torch.arange(out)[:, None] * s - p + torch.arange(k) * d
        for out, k, s, p, d in zip(outputs, kernel, stride, padding, dilation, strict=True)
    ]
    return flat_places(sizes, places)


@lru_cache(maxsize=256)
def adaptive_windows(sizes: tuple[int, ...], outputs: tuple[int, ...]) -> Tensor:
    """Flattened places of adaptive pooling: window i spans floor(i n/m) to ceil((i+1) n/m)."""
    places = []
    for n, m in zip(sizes, outputs, strict=True):
        starts = [i * n // m for i in range(m)]
        ends = [-((i + 1) * n // -m) for i in range(m)]
        width = max(e - s for s, e in zip(starts, ends, strict=True))
        places.append(
            torch.tensor(
                [[s + j if s + j < e else n for j in range(width)]
                 for s, e in zip(starts, ends, strict=True)]
            )
        )  # fmt: skip
    return flat_places(sizes, places)


def flat_places(sizes: tuple[int, ...], places: list[Tensor]) -> Tensor:
    """Combine each dimension's (outputs, window) places into places of the flattened input."""
    index = torch.zeros(1, 1, dtype=torch.long)
    inside = torch.ones(1, 1, dtype=torch.bool)
    for size, place in zip(sizes, places, strict=True):
        valid = (place >= 0) & (place < size)
        index = (index[:, None, :, None] * size + place[None, :, None, :]).flatten(2).flatten(0, 1)
        inside = (inside[:, None, :, None] & valid[None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.where(inside, index, math.prod(sizes))


def tuple_of(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    """Repeat one number for every pooled dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * length if len(values) == 1 else values)


def max_pool_rule(dims: int, *targets: Any) -> None:
    """Declare max pooling over `dims` dimensions, with or without indices."""

    @rule(*targets, name="max_pool")
    def max_pool(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Any
    ) -> tuple[Tensor]:
        (r,), (x,) = reference, sample
        grad = values_grad(grad)
        kernel = tuple_of(operation["kernel_size"], dims)
        windows = pooling_windows(
            tuple(r.shape[-dims:]),
            tuple(grad.shape[-dims:]),
            kernel,
            tuple_of(operation["stride"] or kernel, dims),
            tuple_of(operation["padding"], dims),
            tuple_of(operation["dilation"], dims),
        ).to(r.device)
        return (over_windows(operation, r, x, grad, windows, dims),)


def adaptive_max_pool_rule(dims: int, *targets: Any) -> None:
    """Declare adaptive max pooling over `dims` dimensions."""

    @rule(*targets, name="adaptive_max_pool")
    def adaptive_max_pool(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Any
    ) -> tuple[Tensor]:
        (r,), (x,) = reference, sample
        grad = values_grad(grad)
        windows = adaptive_windows(tuple(r.shape[-dims:]), tuple(grad.shape[-dims:]))
        return (over_windows(operation, r, x, grad, windows.to(r.device), dims),)


max_pool_rule(1, aten.max_pool1d, aten.max_pool1d_with_indices)
max_pool_rule(2, aten.max_pool2d, aten.max_pool2d_with_indices)
max_pool_rule(3, aten.max_pool3d, aten.max_pool3d_with_indices)
adaptive_max_pool_rule(1, aten.adaptive_max_pool1d)
adaptive_max_pool_rule(2, aten.adaptive_max_pool2d)
adaptive_max_pool_rule(3, aten.adaptive_max_pool3d)
