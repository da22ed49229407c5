"""Products of two factors that change together, where a product of mixed endpoints would cancel.

The midpoint of a product a * b is the mean of two orders: a changes first, or b does. Between them
stand the mixed products a_x b_r and a_r b_x. One that is much larger than both endpoints cancels in
the sum, and leaves its rounding errors in the attributions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached
from fxshap.rules.core.correction import correct
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import Tensors
from fxshap.rules.core.secants import midpoint
from fxshap.rules.core.shapes import common_batch_size, flatten_rows, unflatten_rows
from fxshap.rules.core.tracing import any_or_tracing, any_unless_tracing

#: How many times larger than both endpoints, and than 1, a product of mixed endpoints may be.
MAX_MIXED_RATIO = 1e4

#: How many times larger it may be than endpoints that are not 0: more costs the last digits of
#: their change.
MAX_CANCELLATION = 1e6


def intermediate_limit(size: Tensor, mixed: float = MAX_MIXED_RATIO) -> Tensor:
    """Return how large an intermediate value may be whose endpoints have at most this size."""
    limit = torch.minimum(mixed * size.clamp(min=1), MAX_CANCELLATION * size)
    return torch.where(size == 0, mixed, limit)


def mixed_product_may_exceed(a_r: Tensor, b_r: Tensor, a_x: Tensor, b_x: Tensor) -> Tensor:
    """Return a 0-d boolean: False if no a_r b_x exceeds :func:`intermediate_limit`.

    Only the smallest and the largest sizes of the factors are compared. A product that is no
    number counts as too large, as with the logarithm in ``where(a > 0, b * log(a), 0)``.
    """
    (least_b_r, _), (least_a_x, _) = abs_aminmax(b_r), abs_aminmax(a_x)
    (_, most_a_r), (_, most_b_x) = abs_aminmax(a_r), abs_aminmax(b_x)
    cancels = most_b_x > MAX_CANCELLATION * least_b_r
    cancels = cancels & (most_a_r > MAX_CANCELLATION * least_a_x)
    return ~(most_a_r * most_b_x <= MAX_MIXED_RATIO) | cancels


def sequential_factors(
    reference: Tensors,
    sample: Tensors,
    sums: tuple[Tensor, Tensor],
    mixed: float = MAX_MIXED_RATIO,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return twice the point of the derivative of a product, for each factor.

    That is the sum of both endpoints, twice the midpoint, where both mixed products are within the
    limit. Where one is not, the factors change in the other order only. An example is a gate that
    is open at one endpoint and closed at the other, where the factor it multiplies is huge.

    Parameters
    ----------
    reference, sample : pair of Tensor
        Both factors at the two endpoints.
    sums : pair of Tensor
        Reference plus sample of each factor.
    mixed : float
        How many times larger than both endpoints, and than 1, a mixed product may be.
    limit : Tensor, optional
        How large a mixed product may be, in place of the limit that follows from `mixed`.
    """
    (a_r, b_r), (a_x, b_x) = reference, sample
    if limit is None:
        limit = intermediate_limit(torch.maximum((a_r * b_r).abs(), (a_x * b_x).abs()), mixed)
    a_first, b_first = (a_r * b_x).abs() > limit, (a_x * b_r).abs() > limit
    a = torch.where(a_first, 2 * a_x, torch.where(b_first, 2 * a_r, sums[0]))
    b = torch.where(a_first, 2 * b_r, torch.where(b_first, 2 * b_x, sums[1]))
    return a, b


def endpoint_sums(reference: Tensors, sample: Tensors) -> tuple[Tensor, ...]:
    """Return reference plus sample of both factors of a matrix product.

    If mixed products exceed it, the :func:`intermediate_limit` of the outputs follows.
    """
    (a_r, b_r), (a_x, b_x) = reference, sample
    sums = a_r + a_x, b_r + b_x
    if not any_unless_tracing(mixed_product_bound((a_r, a_x), (b_r, b_x)) > MAX_MIXED_RATIO):
        return sums
    a_r, b_r, a_x, b_x = (value.abs() for value in (a_r, b_r, a_x, b_x))
    limit = intermediate_limit(torch.maximum(a_r @ b_r, a_x @ b_x))
    exceeds = (a_r @ b_x > limit) | (a_x @ b_r > limit)
    return (*sums, limit) if any_or_tracing(exceeds, rare=True) else sums


def matmul_grads_termwise(
    reference: Tensors, sample: Tensors, grad: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the cotangents of a matrix product, each of whose terms is a product of its own.

    The order of each term follows from :func:`sequential_factors`, as for a weight of attention
    that vanishes where its value is huge.
    """
    row, column = reference[0].dim() == 1, reference[1].dim() == 1
    half = grad * 0.5
    half, limit = (v.unsqueeze(-1) if column else v for v in (half, limit))
    half, limit = (v.unsqueeze(-2) if row else v for v in (half, limit))
    endpoints = [
        (a.unsqueeze(0) if row else a, b.unsqueeze(-1) if column else b)
        for a, b in (reference, sample)
    ]
    grad_a, grad_b = (torch.zeros_like(factor) for factor in endpoints[0])
    for k in range(grad_a.shape[-1]):
        (a_r, b_r), (a_x, b_x) = ((a[..., k, None], b[..., k, None, :]) for a, b in endpoints)
        a, b = sequential_factors((a_r, b_r), (a_x, b_x), (a_r + a_x, b_r + b_x), limit=limit)
        grad_a[..., k, None] = (half * b).sum_to_size(a_r.shape)
        grad_b[..., k, None, :] = (half * a).sum_to_size(b_r.shape)
    return grad_a.reshape(reference[0].shape), grad_b.reshape(reference[1].shape)


def abs_aminmax(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest absolute value, cached for an endpoint."""

    def compute(v: Tensor) -> tuple[Tensor, Tensor]:
        least, most = v.abs().aminmax() if v.numel() else (v.new_ones(()), v.new_zeros(()))
        return least, most

    return cached(value, "abs_aminmax", compute)


#: A factor at the reference and at the sample.
FactorEndpoints = tuple[Tensor, Tensor]


def mixed_product_bound(a: FactorEndpoints, b: FactorEndpoints) -> Tensor:
    """Return an upper bound of all mixed products, from the largest sizes of the factors."""
    (a_r, a_x), (b_r, b_x) = ([abs_aminmax(value)[1] for value in factor] for factor in (a, b))
    return torch.maximum(a_r * b_x, a_x * b_r)


def midpoint_or_sequential(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any, factors: tuple[int, int]
) -> tuple[Tensor | None, ...]:
    """Take the midpoint, or :func:`sequential_factors_by_row` if mixed products may be huge.

    Parameters
    ----------
    factors : pair of int
        The indices of both factors among the varying arguments.
    """
    bound = mixed_product_bound(*((reference[i], sample[i]) for i in factors))
    if any_unless_tracing(bound > MAX_CANCELLATION):
        return sequential_factors_by_row(operation, reference, sample, grad, factors)
    return midpoint(operation, reference, sample, grad)


def sequential_factors_by_row(
    operation: Operation,
    reference: Tensors,
    sample: Tensors,
    grad: Tensor,
    factors: tuple[int, int],
) -> tuple[Tensor | None, ...]:
    """Choose the order in which the factors change for each row, as :func:`sequential_factors`.

    This is for sums of products whose terms share an order. For t in [0, 1] the vector-Jacobian
    product at a = (1 - t) a_x + t a_r and b = t b_x + (1 - t) b_r restores the difference, where t
    is the weight of the order in which b changes first. It is 1/2 at the midpoint, and 0 or 1 in
    rows whose other order exceeds :func:`intermediate_limit`. Where both orders do, the rounding
    errors are corrected as in :mod:`.generic`.
    """
    sample = [x.expand_as(r) for r, x in zip(reference, sample, strict=True)]
    first, second = factors
    count = common_batch_size(reference, operation.rows[:-1], grad, operation.rows[-1])

    def largest_output(point: Tensors) -> Tensor:
        """Largest output of each row whose cotangent is not 0, of shape (rows, 1)."""
        out = operation(*point)
        assert isinstance(out, Tensor)
        rows = flatten_rows(out.abs().masked_fill(grad == 0, 0.0), operation.rows[-1], count)
        return rows.amax(1, keepdim=True).nan_to_num(math.inf, math.inf)

    def largest_mixed(factor: int) -> Tensor:
        """Largest output with one factor at the sample."""
        values = zip(reference, sample, strict=True)
        return largest_output([x if i == factor else r for i, (r, x) in enumerate(values)])

    def per_element(value: Tensor, index: int) -> Tensor:
        """Expand a number of each row to all elements of an argument."""
        like = reference[index]
        elements = value.expand(count, like.numel() // count)
        return unflatten_rows(elements, like, operation.rows[index])

    limit = intermediate_limit(torch.maximum(largest_output(reference), largest_output(sample)))
    limit = limit.clamp(max=torch.finfo(limit.dtype).max)  # what overflows exceeds it
    a_first, b_first = largest_mixed(first), largest_mixed(second)
    one, both = torch.maximum(a_first, b_first) > limit, torch.minimum(a_first, b_first) > limit
    t = torch.where(one, (a_first > b_first).to(grad.dtype), 0.5)
    point = [torch.lerp(r, x, 0.5) for r, x in zip(reference, sample, strict=True)]
    for index, weight in ((first, 1 - t), (second, t)):
        point[index] = torch.lerp(reference[index], sample[index], per_element(weight, index))
    grads = vjp(operation, point, grad)
    corrected = correct(operation, reference, sample, grad, list(grads))
    return tuple(
        None if m is None or c is None else torch.where(per_element(both, index), c, m)
        for index, (m, c) in enumerate(zip(grads, corrected, strict=True))
    )
