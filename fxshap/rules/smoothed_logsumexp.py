"""Rules of logsumexp and log_softmax that use the moments of their logits: `rule="variance"`.

While a share t of the terms is switched, the logit a_j has the mean m_j = r_j + t (x_j - r_j) +
4 t (1 - t) c_j and the variance s_j^2 = t (1 - t) v_j, like the sums of
:mod:`.smoothed_activations`. The slope of logsumexp for a_j is the mean of the softmax. For
independent normal logits it is about

    P_j = 1 / sum_k exp((m_k - m_j) / sqrt(1 + pi (s_j^2 + s_k^2) / 8))

divided by the sum of all P (Lu, Ie and Sha 2020, "Mean-field approximation to Gaussian-softmax
integral with application to uncertainty estimation"). The mean over t is taken at three points.
What the slopes lack of the change of logsumexp is distributed as for maxima
(:mod:`.smoothed_maxima`). log_softmax is a - logsumexp(a).

Softmax keeps its rule: on perceptrons it would be farther from the exact Shapley values with c.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached_between
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import RULES, Rule, Tensors, find_rule
from fxshap.rules.core.shapes import reduced_dims, restore_dims
from fxshap.rules.smoothed_activations import MAX_RATIO, finite_change, inner_function
from fxshap.rules.smoothed_maxima import (
    MAX_SIZE,
    mean_slopes,
    over_dims,
    with_moments,
    with_rest,
)
from fxshap.rules.softmax import (
    LARGE_CHANGE,
    change_of_logsumexp,
    logsumexp_secant,
    softmax_terms,
)

aten = torch.ops.aten

LOG_SOFTMAX = frozenset({aten.log_softmax, aten._log_softmax, aten.special_log_softmax})
LOGSUMEXP = frozenset({aten.logsumexp, aten.special_logsumexp})
#: Functions of logits whose rules use the moments.
OF_LOGITS = LOG_SOFTMAX | LOGSUMEXP


def of_logits(
    z: Tensor,
    v: Tensor,
    shift: Tensor | None,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return ``function(z, *args, **kwargs)``; the moments matter to the rule only."""
    return function(z, *args, **kwargs)


def of_logits_rule(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """logsumexp: S and T; log_softmax: g - S sum(g) and -T sum(g)."""
    r, x, v, shift = with_moments(reference, sample)
    function, no_multipliers = inner_function(operation), [None] * (len(sample) - 2)
    dims = reduced_dims(function, r)
    of_mean, of_variance = cached_between(
        operation,
        reference[0],
        sample[0],
        lambda: over_dims(smoothed_logsumexp_multipliers, dims, r, x, v, shift),
    )
    target: Any = function.target
    if target.overloadpacket in LOGSUMEXP:
        grad = restore_dims(function, grad, dims)
        return (grad * of_mean, grad * of_variance, *no_multipliers)
    rule = find_rule(target)
    assert rule is not None and rule.backward is not None
    (plain,) = rule.backward(function, (r,), (x,), grad)
    assert plain is not None
    total = grad.sum(dims, keepdim=True)
    smoothed = (of_variance != 0).any(dims[0], keepdim=True)
    of_sum = torch.where(smoothed, (grad - of_mean * total).to(r.dtype), plain)
    return (of_sum, (-of_variance * total).to(r.dtype), *no_multipliers)


def smoothed_logsumexp_multipliers(
    r: Tensor, x: Tensor, v: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return S and T of logsumexp over the last dimension.

    Parameters
    ----------
    r, x : Tensor
        The logits at both endpoints; -inf stands for masked ones.
    v : Tensor
        Their variances, of the shape of both.
    shift : Tensor
        How far their means are from the straight line where half of the terms are switched.
    """
    terms = softmax_terms(r, [-1]), softmax_terms(x, [-1])
    plain, required = logsumexp_secant(r, x, *terms), change_of_logsumexp(*terms)
    if r.shape[-1] > MAX_SIZE:
        return plain, torch.zeros_like(plain)
    change, slopes = finite_change(r, x), mean_slopes(mean_softmax, r, x, v, shift)
    near = (required.abs() <= LARGE_CHANGE) & (v.amax(-1, keepdim=True) <= LARGE_CHANGE**2)
    largest = torch.where(near, MAX_RATIO * (1 + required.abs()), -1.0)
    return with_rest(slopes, plain, change, v, required, largest)


def mean_softmax(mean: Tensor, variance: Tensor) -> Tensor:
    """Return about the mean of the softmax of independent normal logits, in the last dimension.

    Parameters
    ----------
    mean, variance : Tensor
        The mean -inf stands for a masked logit.
    """
    difference = (mean.unsqueeze(-2) - mean.unsqueeze(-1)).nan_to_num_(0.0, math.inf, -math.inf)
    variances = variance.unsqueeze(-2) + variance.unsqueeze(-1)
    odds = (difference / (1 + math.pi / 8 * variances).sqrt_()).exp_()
    odds.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    share = odds.sum(-1).reciprocal().masked_fill(mean == -math.inf, 0.0)
    return share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)


RULES[of_logits] = Rule("smoothed logsumexp", of_logits_rule)
