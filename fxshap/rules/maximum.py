"""Maxima: the exact Shapley value of the max game.

Among the elements of one window let w = max(x, r), t0 = max_j min(x_j, r_j), and sort w downwards.
Between two neighbouring levels above t0, p elements are there only in the sample and q only in the
reference. A coalition S (elements taken from the sample) is above the level when it holds one of
the p or lacks one of the q, so that slice of the level is worth

    +q! (p-1)! / (p+q)!  to each of the p,      -p! (q-1)! / (p+q)!  to each of the q

(Shapley 1953). Below t0 every coalition is above the level and nothing is owed. The multipliers,
shares over differences, lie in [0, 1]. Minima are maxima of the negative.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached_between
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.shapes import reduced_dims, restore_dims

aten = torch.ops.aten


#: Elements for which multipliers are found at a time: sorting takes ten times their memory.
AT_A_TIME = 2**18


def max_multiplier(r: Tensor, x: Tensor) -> Tensor:
    """Multipliers of max over the last dimension, in [0, 1]."""
    r, x = torch.broadcast_tensors(r, x)
    parts = r.numel() // AT_A_TIME + 1
    if r.dim() == 1 or parts == 1:
        return shapley_multiplier(r, x)
    ends = zip(r.chunk(parts), x.chunk(parts), strict=True)
    return torch.cat([shapley_multiplier(*part) for part in ends])


def shapley_multiplier(r: Tensor, x: Tensor) -> Tensor:
    """Multipliers of max over the last dimension, all at once."""
    d = x - r
    level, order = torch.maximum(x, r).sort(dim=-1, descending=True)
    floor = torch.minimum(x, r).amax(-1, keepdim=True)
    below = torch.cat([level[..., 1:], floor], -1)
    slices = (torch.maximum(level, floor) - torch.maximum(below, floor)).nan_to_num(0.0)
    gains = (d > 0).gather(-1, order)
    p, q = gains.cumsum(-1), (~gains).cumsum(-1)
    # An element is present in its own slice and in every slice below it. The share of the q is
    # negative, as are their differences: the ratio is positive for both.
    gain = slices * slice_share(p, q, d.dtype)
    loss = slices * slice_share(q, p, d.dtype)
    owed = torch.where(gains, from_here_down(gain), from_here_down(loss))
    owed = torch.zeros_like(owed).scatter(-1, order, owed)
    still_top = (d == 0) & (x == level[..., :1])
    tie = still_top.to(d.dtype) / still_top.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(d == 0, tie, torch.where(owed > 0, owed / d.abs(), 0.0))


def from_here_down(value: Tensor) -> Tensor:
    """Sum over this and all later places of the last dimension."""
    return value.flip(-1).cumsum(-1).flip(-1)


def slice_share(p: Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """q! (p-1)! / (p+q)!, 0 where p = 0, for whole p and q up to the size of a window."""
    size = p.shape[-1]
    if size <= 128:
        table = share_table(size).to(device=p.device, dtype=dtype)
        return table[p * (size + 1) + q]
    p, q = p.double(), q.double()
    log_share = torch.lgamma(q + 1) + torch.lgamma(p.clamp(min=1)) - torch.lgamma(p + q + 1)
    return torch.where(p > 0, log_share.exp(), 0.0).to(dtype)


@lru_cache(maxsize=64)
def share_table(size: int) -> Tensor:
    """Every q! (p-1)! / (p+q)! = 1 / (p C(p+q, p)), at index p * (size + 1) + q."""
    rows = [
        [1 / (p * math.comb(p + q, p)) if p else 0.0 for q in range(size + 1)]
        for p in range(size + 1)
    ]
    return torch.tensor(rows, dtype=torch.float64).flatten()


# --- over whole dimensions ----------------------------------------------------------------------


def over_dims(r: Tensor, x: Tensor, grad: Tensor, dims: list[int]) -> Tensor:
    """Multiply through a maximum over `dims`, which `grad` has as ones."""
    last = list(range(r.dim() - len(dims), r.dim()))
    ends = [value.movedim(dims, last) for value in (r, x)]
    multiplier = max_multiplier(*(value.flatten(last[0]) for value in ends))
    return multiplier.reshape(ends[0].shape).movedim(last, dims) * grad


def extremum(operation: Operation, r: Tensor, x: Tensor, grad: Tensor, sign: int) -> Tensor:
    """Maximum (sign 1) or minimum (-1) over the operation's dimensions, all by default."""
    dims = reduced_dims(operation, r)
    return over_dims(sign * r, sign * x, restore_dims(operation, grad, dims), dims)


def values_grad(grad: Any) -> Tensor:
    """Return the cotangent of the values, the first output of operations that also give indices."""
    found: Tensor = grad if isinstance(grad, Tensor) else grad[0]
    return found


@rule(aten.amax, aten.max.dim, aten.max.default)
def amax(operation: Operation, reference: Tensors, sample: Tensors, grad: Any) -> tuple[Tensor]:
    """Maximum over dimensions."""
    return (extremum(operation, reference[0], sample[0], values_grad(grad), 1),)


@rule(aten.amin, aten.min.dim, aten.min.default)
def amin(operation: Operation, reference: Tensors, sample: Tensors, grad: Any) -> tuple[Tensor]:
    """Minimum over dimensions."""
    return (extremum(operation, reference[0], sample[0], values_grad(grad), -1),)


# --- of everything so far ----------------------------------------------------------------------

#: The longest dimension for which the maxima of all its beginnings are taken.
LONGEST_WAY = 256


def beginnings(value: Tensor, rest: Tensor | float) -> Tensor:
    """Return every beginning of the last dimension, as rows filled up with `rest`."""
    size = value.shape[-1]
    seen = torch.ones(size, size, dtype=torch.bool, device=value.device).tril()
    return torch.where(seen, value.unsqueeze(-2), rest)


@rule(aten.cummax, aten.cummin)
def cumulative_maximum(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Largest or smallest element so far: the maximum of every beginning."""
    dim, shape = operation["dim"], reference[0].shape
    if reference[0].dim() == 0 or shape[dim] > LONGEST_WAY:
        return generic(operation, reference, sample, grad)
    sign = 1 if operation.target is aten.cummax.default else -1
    ends = [sign * value.movedim(dim, -1) for value in (reference[0], sample[0])]
    lowest = torch.minimum(*ends).amin(-1, keepdim=True).unsqueeze(-1)
    # What stands for the elements to come is lower than all, and the same at both ends.
    rest = (lowest - lowest.abs() - 1).clamp_min(torch.finfo(lowest.dtype).min)
    multiplier = max_multiplier(*(beginnings(value, rest) for value in ends))
    total = beginnings_sum(multiplier, values_grad(grad).movedim(dim, -1))
    return (total.movedim(-1, dim),)


def beginnings_sum(multiplier: Tensor, grad: Tensor) -> Tensor:
    """Sum over the beginnings that each element is in."""
    return (multiplier.tril() * grad.unsqueeze(-1)).sum(-2)


# --- of two tensors -----------------------------------------------------------------------------


def of_two(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor, sign: int
) -> tuple[Tensor, ...]:
    """Larger (sign 1) or smaller (-1) of two tensors, either of which may be constant."""
    constant = operation["other" if operation.slots[0] == 0 else "self"]
    r, x = (list(end) if len(end) == 2 else [end[0], constant] for end in (reference, sample))
    shape = grad.shape
    ends = (sign * torch.stack([value.expand(shape) for value in end], -1) for end in (r, x))
    multiplier = cached_between(
        operation, reference[0], sample[0], lambda: max_multiplier(*ends)
    ) * grad.unsqueeze(-1)
    return tuple(multiplier[..., i].sum_to_size(value.shape) for i, value in enumerate(reference))


@rule(aten.maximum, aten.max.other, aten.fmax)
def maximum(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor, ...]:
    """Elementwise maximum of two tensors."""
    return of_two(operation, reference, sample, grad, 1)


@rule(aten.minimum, aten.min.other, aten.fmin)
def minimum(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor, ...]:
    """Elementwise minimum of two tensors."""
    return of_two(operation, reference, sample, grad, -1)
