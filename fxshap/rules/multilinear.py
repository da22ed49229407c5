"""Multilinear operations: products of many factors, determinants and einsum.

An operation that is linear in each of n players has its exact Shapley values by quadrature along
the straight path from the reference to the sample (Owen 1972, theorem 5).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxshap.rules.core.cancellation import intermediate_limit, midpoint_or_sequential
from fxshap.rules.core.correction import correct
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.secants import midpoint
from fxshap.rules.core.shapes import apply_by_slice, slices_along
from fxshap.rules.core.tracing import any_unless_tracing

aten = torch.ops.aten

#: The largest number of quadrature points; they are exact up to twice as many factors.
MAX_POINTS = 64


def multilinear(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any, degree: int
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian products averaged over the path from reference to sample.

    A function that is linear in every player is its own multilinear extension, whose gradient
    averaged along the diagonal is the Shapley value (Owen 1972, theorem 5):

        m_j = integral over t in [0, 1] of (df / da_j)(r + t (x - r))

    For n players (`degree`) the integrand is a polynomial of degree n - 1 in t, which
    Gauss-Legendre quadrature integrates exactly with n / 2 points. :func:`.correction.correct` adds
    what the mean lacks of the finite difference: rounding errors, and the error of the quadrature
    where n is more than twice :data:`MAX_POINTS`.
    """
    points, weights = np.polynomial.legendre.leggauss(min(-(-degree // 2), MAX_POINTS))
    total = [torch.zeros_like(r) for r in reference]
    sample = [x.expand_as(r) for r, x in zip(reference, sample, strict=True)]
    for point, weight in zip(points, weights, strict=True):
        t = float(point + 1) / 2
        at = [torch.lerp(r, x, t) for r, x in zip(reference, sample, strict=True)]
        for mean, gradient in zip(total, vjp(operation, at, grad), strict=True):
            if gradient is not None:
                # A point where the operation overflows or has no derivative adds nothing.
                mean.add_(gradient.nan_to_num(0.0, 0.0, 0.0), alpha=float(weight) / 2)
    return correct(operation, reference, sample, grad, list(total))


@rule(aten.prod, aten.cumprod)
def prod(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Product along a dimension, or cumulative product: the mean of :func:`multilinear`.

    Attributions that are larger than :func:`intermediate_limit` permits only cancel: the path
    passes products that are huge although neither endpoint is. :func:`sequential_product` replaces
    them in such slices, and in those whose product overflows when each factor takes its larger
    endpoint.
    """
    (r,) = reference
    dim = operation.get("dim")
    degree = math.prod(r.shape) if dim is None else r.shape[dim] if r.dim() else 1
    (m,) = multipliers = multilinear(operation, reference, sample, grad, max(degree, 1))
    if m is None or m.is_complex() or not m.numel():
        return multipliers
    cumulative = operation.target is aten.cumprod.default
    g = slices_along(grad, dim) if cumulative else grad.reshape(-1, 1)
    slices_r, slices_x = (
        slices_along(endpoint.expand_as(r), dim).to(g.dtype) for endpoint in (r, *sample)
    )
    y_r, y_x = (
        endpoint.cumprod(-1) if cumulative else endpoint.prod(-1, keepdim=True)
        for endpoint in (slices_r, slices_x)
    )
    limit = (g.abs() * intermediate_limit(torch.maximum(y_r.abs(), y_x.abs()))).sum(-1)
    attributions = slices_along(m, dim) * (slices_x - slices_r)
    # The attributions do not show an overflow on the path: multilinear() left it out.
    largest_product = torch.maximum(slices_r.abs(), slices_x.abs()).prod(-1)
    excess = ~(attributions.abs().amax(-1) <= limit) | ~largest_product.isfinite()
    if not any_unless_tracing(excess):
        return multipliers
    target = aten.cumprod.default if cumulative else aten.prod.dim_int

    def multilinear_product(g: Tensor, r: Tensor, x: Tensor) -> Tensor:
        bound, _ = Operation.bind(target, (r, -1))
        (m,) = multilinear(bound, [r], [x], g if cumulative else g.squeeze(-1), r.shape[-1])
        assert m is not None
        return m

    m = apply_by_slice(
        dim, excess, multilinear_product, sequential_product, g, slices_r, slices_x, like=r
    )
    return (m.to(r.dtype),)


def sequential_product(grad: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """Multipliers of a product, or a cumulative product, whose factors move one after another.

    The factors that shrink most move first. The product then first falls and later rises, and is
    never larger than at one of the endpoints. A factor's multiplier is the product of the samples
    of the factors that moved before it and the references of those that move after it.

    Parameters
    ----------
    grad : Tensor
        Of shape (slices, 1) for a product, (slices, factors) for a cumulative product.
    r, x : Tensor
        Of shape (slices, factors).

    Returns
    -------
    Tensor
        Of shape (slices, factors).
    """
    out = torch.zeros_like(r)
    growth = (x / r).abs().nan_to_num(1.0, math.inf)
    for j in range(grad.shape[-1]):
        count = j + 1 if grad.shape[-1] > 1 else r.shape[-1]
        order = growth[:, :count].argsort(dim=-1, stable=True)
        samples, references = x.gather(-1, order), r.gather(-1, order)
        one = torch.ones_like(samples[:, :1])
        before = torch.cat([one, samples[:, :-1]], -1).cumprod(-1)
        after = torch.cat([one, references[:, 1:].flip(-1)], -1).cumprod(-1).flip(-1)
        out.scatter_add_(-1, order, before * after * grad[:, j : j + 1])
    return out


@rule(aten.linalg_det, aten.det)
def det(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Determinant: :func:`multilinear`, with as many players in a term as the matrix has rows.

    The determinant is linear in each entry, because every term of the Leibniz formula is a product
    of different entries.
    """
    return multilinear(operation, reference, sample, grad, max(reference[0].shape[-1], 1))


@rule(aten.bilinear, linear_in=((0, 3), (1, 3), (2, 3)), name="product")
def bilinear_form(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """y_k = a^T W_k b: the midpoint where two of the three vary, :func:`multilinear` for all."""
    factors = [index for index, slot in enumerate(operation.slots) if slot < 3]
    if len(factors) > 2 or grad.is_complex():
        return multilinear(operation, reference, sample, grad, len(factors))
    return midpoint_or_sequential(operation, reference, sample, grad, (factors[0], factors[1]))


@rule(aten.einsum, linear_in=(), name="product")
def einsum(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The midpoint for one or two varying operands, :func:`multilinear` for more."""
    if len(reference) == 2 and not grad.is_complex():
        return midpoint_or_sequential(operation, reference, sample, grad, (0, 1))
    if len(reference) <= 2:
        return midpoint(operation, reference, sample, grad)
    return multilinear(operation, reference, sample, grad, len(reference))
