"""Maxima: the exact Shapley value of the max game.

The players are the elements over which a maximum is taken, and a coalition S holds those that take
their sample's value. Let w = max(x, r) and t0 = max_j min(x_j, r_j), and sort w downwards.
At a level between two neighbouring values of w above t0, p elements reach the level in the sample
only and q in the reference only. The maximum of a coalition reaches it if S contains one of the p
or lacks one of the q. The interval between the two values, times its length, adds to the Shapley
values (Shapley 1953)

    +q! (p-1)! / (p+q)!  for each of the p,      -p! (q-1)! / (p+q)!  for each of the q

Below t0 the maximum of every coalition reaches the level, and the interval adds nothing. The
multipliers, Shapley values divided by differences, lie in [0, 1]. A minimum is the negative maximum
of the negatives.
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
from fxshap.rules.core.registry import Target, Tensors, rule
from fxshap.rules.core.shapes import reduced_dims, restore_dims

aten = torch.ops.aten


#: The number of elements whose multipliers are computed at once: sorting takes ten times their
#: memory.
MAX_CHUNK_ELEMENTS = 2**18
#: The largest number of elements whose Shapley weights are looked up in a table.
MAX_TABLE_SIZE = 128


def max_multiplier(r: Tensor, x: Tensor) -> Tensor:
    """Return the multipliers of the maximum over the last dimension, in [0, 1]."""
    r, x = torch.broadcast_tensors(r, x)
    chunks = r.numel() // MAX_CHUNK_ELEMENTS + 1
    if r.dim() == 1 or chunks == 1:
        return shapley_multiplier(r, x)
    pairs = zip(r.chunk(chunks), x.chunk(chunks), strict=True)
    return torch.cat([shapley_multiplier(*pair) for pair in pairs])


def shapley_multiplier(r: Tensor, x: Tensor) -> Tensor:
    """Return the multipliers of the maximum over the last dimension, without chunks."""
    d = x - r
    level, order = torch.maximum(x, r).sort(dim=-1, descending=True)
    floor = torch.minimum(x, r).amax(-1, keepdim=True)
    below = torch.cat([level[..., 1:], floor], -1)
    length = (torch.maximum(level, floor) - torch.maximum(below, floor)).nan_to_num(0.0)
    gains = (d > 0).gather(-1, order)
    p, q = gains.cumsum(-1), (~gains).cumsum(-1)
    # An element reaches the interval below its own level and all lower ones. The Shapley values of
    # the q are negative, as are their differences: the quotient of the sizes is right for both.
    gain = length * shapley_weight(p, q, d.dtype)
    loss = length * shapley_weight(q, p, d.dtype)
    phi = torch.where(gains, reverse_cumsum(gain), reverse_cumsum(loss))
    phi = torch.zeros_like(phi).scatter(-1, order, phi)
    # Of elements that do not change, those at the top share the derivative.
    constant_top = (d == 0) & (x == level[..., :1])
    tie = constant_top.to(d.dtype) / constant_top.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(d == 0, tie, torch.where(phi > 0, phi / d.abs(), 0.0))


def reverse_cumsum(value: Tensor) -> Tensor:
    """Return the sum over each element and all later ones of the last dimension."""
    return value.flip(-1).cumsum(-1).flip(-1)


def shapley_weight(p: Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """Return q! (p-1)! / (p+q)!, 0 where p = 0, for p + q up to the size of the last dimension."""
    size = p.shape[-1]
    if size <= MAX_TABLE_SIZE:
        table = shapley_weight_table(size).to(device=p.device, dtype=dtype)
        return table[p * (size + 1) + q]
    p, q = p.double(), q.double()
    log_weight = torch.lgamma(q + 1) + torch.lgamma(p.clamp(min=1)) - torch.lgamma(p + q + 1)
    return torch.where(p > 0, log_weight.exp(), 0.0).to(dtype)


@lru_cache(maxsize=64)
def shapley_weight_table(size: int) -> Tensor:
    """Return all q! (p-1)! / (p+q)! = 1 / (p C(p+q, p)), at index p * (size + 1) + q."""
    rows = [
        [1 / (p * math.comb(p + q, p)) if p else 0.0 for q in range(size + 1)]
        for p in range(size + 1)
    ]
    return torch.tensor(rows, dtype=torch.float64).flatten()


# --- over dimensions ----------------------------------------------------------------------------


def max_backward(r: Tensor, x: Tensor, grad: Tensor, dims: list[int]) -> Tensor:
    """Return the cotangent of the argument of a maximum over `dims`, which are ones in `grad`."""
    last = list(range(r.dim() - len(dims), r.dim()))
    endpoints = [value.movedim(dims, last) for value in (r, x)]
    multiplier = max_multiplier(*(value.flatten(last[0]) for value in endpoints))
    return multiplier.reshape(endpoints[0].shape).movedim(last, dims) * grad


def values_grad(grad: Any) -> Tensor:
    """Return the cotangent of the values, the first output if an operation also returns indices."""
    of_values: Tensor = grad if isinstance(grad, Tensor) else grad[0]
    return of_values


def reduction_rule(name: str, sign: int, *targets: Target) -> None:
    """Declare a maximum (`sign` 1) or minimum (-1) over dimensions, by default over all."""

    @rule(*targets, name=name)
    def backward(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Any
    ) -> tuple[Tensor]:
        (r,), (x,) = reference, sample
        if not r.dim():  # a single number is its own maximum
            return (values_grad(grad),)
        dims = reduced_dims(operation, r)
        grad = restore_dims(operation, values_grad(grad), dims)
        return (max_backward(sign * r, sign * x, grad, dims),)


reduction_rule("amax", 1, aten.amax, aten.max.dim, aten.max.default)
reduction_rule("amin", -1, aten.amin, aten.min.dim, aten.min.default)

# --- cumulative ---------------------------------------------------------------------------------

#: The largest dimension for which the maxima of all its prefixes are computed; the time and memory
#: grow with its square.
MAX_CUMULATIVE_SIZE = 256


def prefixes(value: Tensor, padding: Tensor) -> Tensor:
    """Return every prefix of the last dimension as a row, filled up with `padding`."""
    size = value.shape[-1]
    in_prefix = torch.ones(size, size, dtype=torch.bool, device=value.device).tril()
    return torch.where(in_prefix, value.unsqueeze(-2), padding)


def cumulative_rule(name: str, sign: int, target: Target) -> None:
    """Declare a cumulative maximum (`sign` 1) or minimum (-1): the maximum of every prefix."""

    @rule(target, name=name)
    def backward(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Any
    ) -> tuple[Tensor | None, ...]:
        dim, shape = operation["dim"], reference[0].shape
        if reference[0].dim() == 0 or shape[dim] > MAX_CUMULATIVE_SIZE:
            return generic(operation, reference, sample, grad)
        endpoints = [sign * value.movedim(dim, -1) for value in (reference[0], sample[0])]
        lowest = torch.minimum(*endpoints).amin(-1, keepdim=True).unsqueeze(-1)
        # The padding is lower than all elements, and the same at both endpoints.
        padding = (lowest - lowest.abs() - 1).clamp_min(torch.finfo(lowest.dtype).min)
        multiplier = max_multiplier(*(prefixes(value, padding) for value in endpoints))
        prefix_grads = multiplier.tril() * values_grad(grad).movedim(dim, -1).unsqueeze(-1)
        return (prefix_grads.sum(-2).movedim(-1, dim),)


cumulative_rule("cummax", 1, aten.cummax)
cumulative_rule("cummin", -1, aten.cummin)

# --- of two tensors -----------------------------------------------------------------------------


def elementwise_rule(name: str, sign: int, *targets: Target) -> None:
    """Declare the larger (`sign` 1) or smaller (-1) of two tensors; one of them may be constant."""

    @rule(*targets, name=name)
    def backward(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
    ) -> tuple[Tensor, ...]:
        constant = operation["other" if operation.slots[0] == 0 else "self"]
        r, x = (
            list(endpoint) if len(endpoint) == 2 else [endpoint[0], constant]
            for endpoint in (reference, sample)
        )
        shape = grad.shape
        endpoints = (
            sign * torch.stack([value.expand(shape) for value in endpoint], -1)
            for endpoint in (r, x)
        )
        multiplier = cached_between(
            operation, reference[0], sample[0], lambda: max_multiplier(*endpoints)
        )
        grads = (multiplier * grad.unsqueeze(-1)).unbind(-1)
        return tuple(g.sum_to_size(value.shape) for g, value in zip(grads, reference, strict=False))


elementwise_rule("maximum", 1, aten.maximum, aten.max.other, aten.fmax)
elementwise_rule("minimum", -1, aten.minimum, aten.min.other, aten.fmin)
