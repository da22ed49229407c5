"""Max pooling: the max game (:mod:`.maximum`) of every window, sliding or adaptive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxshap.rules.core.caching import cached_between
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.maximum import max_multiplier, values_grad

aten = torch.ops.aten


class Windows(NamedTuple):
    """The windows of max pooling over the last dimensions of its input.

    Attributes
    ----------
    indices : Tensor
        The indices into the flattened input that each output pools, of shape (outputs, window
        size). An index one past the end stands for padding.
    dims : int
        Number of pooled dimensions.
    """

    indices: Tensor
    dims: int

    def gather(self, value: Tensor, padding: float) -> Tensor:
        """Return the elements of every window of an input, of shape (..., outputs, window size)."""
        padded = F.pad(value.flatten(-self.dims), (0, 1), value=padding)
        return padded[..., self.indices]

    def backward(self, multiplier: Tensor, grad: Tensor, sizes: torch.Size) -> Tensor:
        """Return the cotangent of an input of these sizes, given those of every window."""
        window_grads = multiplier * grad.flatten(-self.dims).unsqueeze(-1)
        size = math.prod(sizes[-self.dims :]) + 1  # the last element stands for padding
        out = window_grads.new_zeros(*window_grads.shape[:-2], size)
        out.index_add_(-1, self.indices.flatten(), window_grads.flatten(-2))
        return out[..., :-1].reshape(sizes)


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


def windows_of(operation: Operation, r: Tensor, grad: Tensor) -> Windows:
    """Return the windows of a max pooling of `r`, given the cotangent of the pooled values."""
    packet: Any = operation.target
    packet = packet.overloadpacket
    dims = POOLS.get(packet) or ADAPTIVE_POOLS[packet]
    sizes, outputs = tuple(r.shape[-dims:]), tuple(grad.shape[-dims:])
    if packet in ADAPTIVE_POOLS:
        return Windows(adaptive_windows(sizes, outputs).to(r.device), dims)
    kernel = per_dim(operation["kernel_size"], dims)
    indices = pooling_windows(
        sizes,
        outputs,
        kernel,
        per_dim(operation["stride"] or kernel, dims),
        per_dim(operation["padding"], dims),
        per_dim(operation["dilation"], dims),
    )
    return Windows(indices.to(r.device), dims)


#: Max pooling, with or without indices, and the number of its dimensions.
POOLS: dict[Any, int] = {
    aten.max_pool1d: 1, aten.max_pool1d_with_indices: 1,
    aten.max_pool2d: 2, aten.max_pool2d_with_indices: 2,
    aten.max_pool3d: 3, aten.max_pool3d_with_indices: 3,
}  # fmt: skip
ADAPTIVE_POOLS: dict[Any, int] = {
    aten.adaptive_max_pool1d: 1, aten.adaptive_max_pool2d: 2, aten.adaptive_max_pool3d: 3,
}  # fmt: skip


def max_pool_backward(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor]:
    """Return the cotangent of the input of max pooling."""
    (r,), (x,), grad = reference, sample, values_grad(grad)
    windows = windows_of(operation, r, grad)

    def multiplier() -> Tensor:
        return max_multiplier(*(windows.gather(value, -math.inf) for value in (r, x)))

    return (windows.backward(cached_between(operation, r, x, multiplier), grad, r.shape),)


rule(*POOLS, name="max_pool")(max_pool_backward)
rule(*ADAPTIVE_POOLS, name="adaptive_max_pool")(max_pool_backward)
