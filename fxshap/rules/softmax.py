"""Softmax, log_softmax, logsumexp and logcumsumexp: closed forms through logsumexp.

With L = logsumexp(a), c the larger L of the two endpoints, e = exp(a - c), S = sum e = exp(L - c)
and D(d) = (1 - e^-|d|) / |d|, the divided difference of an exponential is the value at its larger
endpoint times D:

    logsumexp    m_j = (dL / dS) (de_j / da_j) = max(e_j) D(da_j) / D(dL)
    log_softmax  u = a - L                              grad_j = g_j - m_j sum_i g_i
    softmax      l_i = dy_i / du_i = max(y_i) D(du_i)   grad_j = l_j g_j - m_j sum_i l_i g_i

All are bounded and invariant to shifts of the logits. The chain exp, sum, reciprocal and product
would add up too, but its parts overflow, and its multipliers change with a shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxshap.rules.core.blocks import in_blocks
from fxshap.rules.core.caching import cached, cached_between, multiply_in_place
from fxshap.rules.core.correction import restore_along
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.shapes import apply_by_slice, reduced_dims, restore_dims, slices_along
from fxshap.rules.core.tracing import any_unless_tracing
from fxshap.rules.univariate import mean_decay, sigmoid_secant

aten = torch.ops.aten


#: Where a logit or logsumexp changes by more, the closed forms lose two digits or more.
LARGE_CHANGE = 100.0


class SoftmaxTerms(NamedTuple):
    """Softmax of one endpoint and its logsumexp L in two terms.

    Attributes
    ----------
    y : Tensor
        The softmax.
    maximum, log_sum : Tensor
        The largest logit, and L minus it, with the reduced dimensions as ones.
    """

    y: Tensor
    maximum: Tensor
    log_sum: Tensor


def softmax_terms(a: Tensor, dims: list[int]) -> SoftmaxTerms:
    """Return softmax and logsumexp of `a` over `dims`; y is 0 where all logits are -inf."""
    maximum = a.amax(dims, keepdim=True)
    maximum = maximum.masked_fill(maximum == -math.inf, 0.0)
    e = (a - maximum).exp_()
    total = e.sum(dims, keepdim=True)
    y = e.div_(total.clamp_min(torch.finfo(a.dtype).tiny))
    return SoftmaxTerms(y, maximum, total.log())


def change_of_logsumexp(r: SoftmaxTerms, x: SoftmaxTerms) -> Tensor:
    """L_x - L_r; 0 where both are -inf."""
    return ((x.maximum - r.maximum) + (x.log_sum - r.log_sum)).nan_to_num_(0.0)


def softmax_secant(r: Tensor, x: Tensor, terms_r: SoftmaxTerms, terms_x: SoftmaxTerms) -> Tensor:
    """l_i = dy_i / du_i, with u_x - u_r = (x - r) - (L_x - L_r)."""

    def secant(r: Tensor, x: Tensor, y_r: Tensor, y_x: Tensor, change: Tensor) -> Tensor:
        return mean_decay(r + change, x).mul_(torch.maximum(y_r, y_x))

    return in_blocks(secant, r, x, terms_r.y, terms_x.y, change_of_logsumexp(terms_r, terms_x))


def logsumexp_secant(r: Tensor, x: Tensor, terms_r: SoftmaxTerms, terms_x: SoftmaxTerms) -> Tensor:
    """m_j = (dL / dS) (de_j / da_j)."""
    change = change_of_logsumexp(terms_r, terms_x)
    # e = y S, and S is 1 at the endpoint with the larger L.
    s_r, s_x = (-change).clamp_(max=0).exp_(), change.clamp(max=0).exp_()
    decay = mean_decay(torch.zeros_like(change), change)

    def secant(
        r: Tensor, x: Tensor, y_r: Tensor, y_x: Tensor, s_r: Tensor, s_x: Tensor, decay: Tensor
    ) -> Tensor:
        # The division comes last: a logit that dominates its slice has a multiplier of exactly 1
        # then.
        return mean_decay(r, x).mul_(torch.maximum(y_r * s_r, y_x * s_x)).div_(decay)

    return in_blocks(secant, r, x, terms_r.y, terms_x.y, s_r, s_x, decay)


def largest_change(r: Tensor, x: Tensor, terms_r: SoftmaxTerms, terms_x: SoftmaxTerms) -> Tensor:
    """The largest |L_x - L_r| of all slices, as a scalar tensor."""
    return change_of_logsumexp(terms_r, terms_x).abs().amax()


def cached_secants(
    operation: Operation,
    reference: Tensors,
    sample: Tensors,
    dtype: torch.dtype,
    *secants: Callable[[Tensor, Tensor, SoftmaxTerms, SoftmaxTerms], Tensor],
) -> tuple[Tensor, ...]:
    """Return `secants` between both endpoints, in the dtype of the output."""
    (r,), (x,) = reference, sample

    def compute() -> tuple[Tensor, ...]:
        terms = cached_terms(operation, r, dtype), cached_terms(operation, x, dtype)
        return tuple(secant(r.to(dtype), x.to(dtype), *terms) for secant in secants)

    return cached_between(operation, r, x, compute)


def cached_terms(operation: Operation, value: Tensor, dtype: torch.dtype) -> SoftmaxTerms:
    """Return :func:`softmax_terms` of one endpoint over the dimensions of an operation."""
    dims = reduced_dims(operation, value)
    return cached(
        value, f"softmax terms {dims} {dtype}", lambda a: softmax_terms(a.to(dtype), dims)
    )


@rule(aten.logsumexp, aten.special_logsumexp, real_only=True)
def logsumexp(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """y = log(sum(exp(a))) over one or more dimensions: m_j = (dL / dS) (de_j / da_j)."""
    if not reference[0].dim():  # of a single number that number
        return (grad,)
    (m,) = cached_secants(operation, reference, sample, grad.dtype, logsumexp_secant)
    return (multiply_in_place(m, restore_dims(operation, grad, reduced_dims(operation, m))),)


@rule(aten.logcumsumexp, closed_form=False, name="generic")
def logcumsumexp(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """y_j = logsumexp(a_1, ..., a_j): the generic rule, except where logits change much.

    In slices where a logit changes by more than :data:`LARGE_CHANGE`, each output is treated as a
    :func:`logsumexp` on its own. The derivatives that the generic rule averages cancel there, and
    PyTorch's own derivative, exp(a - L + log g), loses the digits of log g where a is huge.
    """
    if grad.is_complex() or not grad.numel():
        return generic(operation, reference, sample, grad)
    (r,), dim = reference, operation["dim"]
    g, slices_r, slices_x = (slices_along(v.expand_as(r), dim) for v in (grad, r, *sample))
    large = (slices_x - slices_r).abs().amax(-1) > LARGE_CHANGE
    if not any_unless_tracing(large):
        return generic(operation, reference, sample, grad)

    def generic_slices(g: Tensor, r: Tensor, x: Tensor) -> Tensor:
        (m,) = generic(Operation.bind(operation.target, (r, -1))[0], [r], [x], g)
        assert m is not None
        return m

    return (
        apply_by_slice(
            dim, large, generic_slices, logcumsumexp_by_output, g, slices_r, slices_x, like=r
        ),
    )


def logcumsumexp_by_output(grad: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """Multipliers of logcumsumexp along the last dimension: the sum of those of each logsumexp."""
    out = torch.zeros_like(grad)
    for j in range(grad.shape[-1]):
        prefix_r, prefix_x = r[..., : j + 1], x[..., : j + 1]
        terms = softmax_terms(prefix_r, [-1]), softmax_terms(prefix_x, [-1])
        out[..., : j + 1] += logsumexp_secant(prefix_r, prefix_x, *terms).mul_(grad[..., j, None])
    return out


@rule(aten.log_softmax, aten._log_softmax, aten.special_log_softmax)
def log_softmax(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """y = a - logsumexp(a): grad_j = g_j - m_j sum_i g_i with the multipliers m of logsumexp."""
    m, change_of_l = cached_secants(
        operation, reference, sample, grad.dtype, logsumexp_secant, largest_change
    )
    dims = reduced_dims(operation, m)
    total = grad.sum(dims, keepdim=True)
    out = grad - multiply_in_place(m, total)
    # m of a logit that dominates its slice is 1 minus about 1/change: g (1 - m) loses its digits.
    if any_unless_tracing(change_of_l > LARGE_CHANGE):
        r, x = reference[0].to(grad.dtype), sample[0].to(grad.dtype)
        y_r, y_x = (
            log_softmax_from_terms(endpoint, cached_terms(operation, endpoint, grad.dtype))
            for endpoint in (r, x)
        )
        change = torch.where(y_r == y_x, 0.0, y_x - y_r)  # 0 also where both are -inf
        out = restore_along(dims, out, grad, r, x, change)
    return (out.to(reference[0].dtype),)


def log_softmax_from_terms(a: Tensor, terms: SoftmaxTerms) -> Tensor:
    """Return log_softmax(a), given the terms of a."""
    return (a - terms.maximum) - terms.log_sum


@rule(aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax)
def softmax(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """y = exp(u) with u = a - logsumexp(a): grad_j = l_j g_j - m_j sum_i l_i g_i.

    :func:`sequential_softmax` replaces slices in which such attributions only cancel.
    """
    dy_du, m, change_of_l = cached_secants(
        operation, reference, sample, grad.dtype, softmax_secant, logsumexp_secant, largest_change
    )
    dims = reduced_dims(operation, m)

    def backward(grad: Tensor, dy_du: Tensor, m: Tensor) -> Tensor:
        weighted = grad * dy_du
        return weighted.addcmul_(m, weighted.sum(dims, keepdim=True), value=-1)

    out = backward(grad, dy_du, m) if 0 in dims else in_blocks(backward, grad, dy_du, m)
    # m of a logit that dominates its slice is so near to 1 that the difference loses its digits.
    if any_unless_tracing(change_of_l > LARGE_CHANGE):
        r, x = reference[0].to(grad.dtype), sample[0].to(grad.dtype)
        y_r, y_x = (cached_terms(operation, endpoint, grad.dtype).y for endpoint in (r, x))
        out = restore_along(dims, out, grad, r, x, y_x - y_r)
        limit = MAX_EFFECT_RATIO * largest_effect(dims[0], grad, y_r, y_x)
        out = replace_cancelling_slices(dims[0], out, grad, r, x, limit)
    return (out.to(reference[0].dtype),)


#: How many times larger than the largest effect of softmax the attributions of a slice may be.
MAX_EFFECT_RATIO = 1e4
#: The largest effect is taken to be at least the range of the cotangent divided by this.
MAX_RANGE_RATIO = 1e6


def largest_effect(dim: int, grad: Tensor, y_r: Tensor, y_x: Tensor) -> Tensor:
    """Bound the change of <g, softmax> in every slice along `dim`.

    Only the distance of a cotangent from the mean counts, because the outputs sum to 1, and only
    where y is not 0 at both endpoints.
    """
    value_range = grad.amax(dim) - grad.amin(dim)
    mean = (grad * ((y_r + y_x) / 2)).sum(dim, keepdim=True)
    bound = (torch.maximum(y_r, y_x) * (grad - mean).abs()).sum(dim)
    return torch.maximum(bound, value_range / MAX_RANGE_RATIO)


def replace_cancelling_slices(
    dim: int, multipliers: Tensor, grad: Tensor, r: Tensor, x: Tensor, limit: Tensor
) -> Tensor:
    """Replace multipliers by :func:`sequential_softmax` where attributions are above `limit`.

    Where all logits of a slice change much and together, as from (0, 0) to (c, c), the closed form
    gives the attributions c / 4 and -c / 4, as the derivative does. Their sum holds no digits of
    the change of softmax.
    """
    m, g, r, x = (v.expand_as(multipliers).movedim(dim, -1) for v in (multipliers, grad, r, x))
    step = torch.where(x == r, 0.0, x - r)  # 0 also where both are -inf
    largest = (m * step).abs().amax(-1)
    excess = ~(largest <= limit)  # also where the attributions overflow
    if not excess.any():
        return multipliers
    slices = [value[excess] for value in (g, r, x)]
    reversed_order = sequential_softmax(*[value.flip(-1) for value in slices]).flip(-1)
    m = m.clone()
    m[excess] = (sequential_softmax(*slices) + reversed_order) / 2
    replaced: Tensor = m.movedim(-1, dim)
    return replaced


def sequential_softmax(grad: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """Multipliers of softmax along the last dimension where logits change one after another.

    While a_j changes, y_j is a logistic function s of a_j - M, where M is the logsumexp of the
    other logits. The other outputs lose what y_j gains:

        m_j = (g_j - mean of g over the others, weighted by their softmax) ds / da_j

    The sums telescope, and no attribution is larger than the range of g. The mean over all orders
    would be the Shapley value (Shapley 1953). The mean of one order and its reverse is exact for
    two logits.
    """
    out = torch.zeros_like(grad)
    others = r.clone()
    for j in range(r.shape[-1]):
        others[..., j] = -math.inf
        terms = softmax_terms(others, [-1])
        relative = [
            log_softmax_from_terms(endpoint[..., j, None], terms).squeeze(-1) for endpoint in (r, x)
        ]
        mean = (terms.y * grad).sum(-1)
        out[..., j] = (grad[..., j] - mean) * sigmoid_secant(*relative)
        others[..., j] = x[..., j]
    return out.nan_to_num_(0.0)  # NaN of a logit at -inf whose others are all -inf
