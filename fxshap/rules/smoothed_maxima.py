"""Rules of maxima that use the variances of their arguments: `rule="variance"`.

While a share t of the terms is switched, the argument a_j of a maximum has the mean
r_j + t (x_j - r_j) + 4 t (1 - t) c_j and the variance t (1 - t) v_j, like the sums of
:mod:`.smoothed_activations`.
The slope of the maximum for a_j is the chance that a_j is the largest. For independent normal
numbers with the means m and the deviations s (Clark 1961 has the case of two) it is

    P_j = E prod_k Phi((m_j + s_j xi - m_k) / s_k)    over k != j, for a standard normal xi

The means over xi and over t are taken at three points each, and the P_j are divided by their sum.
What the slopes S_j lack of the change of the maximum is distributed to the arguments by S_j v_j:

    m_j = S_j,    T_j = S_j (y_x - y_r - sum_k S_k (x_k - r_k)) / sum_k S_k v_k

where T_j is the multiplier of v_j. This adds up for any S. Where the quotient has no digits, and
for more than :data:`MAX_SIZE` arguments, the multipliers are those of the max game
(:mod:`.maximum`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached_between
from fxshap.rules.core.generic import GAUSS_LEGENDRE
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import RULES, Rule, Tensors
from fxshap.rules.core.shapes import reduced_dims, restore_dims
from fxshap.rules.maximum import max_multiplier, values_grad
from fxshap.rules.pooling import ADAPTIVE_POOLS, POOLS, windows_of
from fxshap.rules.smoothed_activations import MAX_RATIO, finite_change, inner_function

aten = torch.ops.aten

#: Overloads that are maxima over dimensions, and what makes them maxima. Others are of two tensors.
REDUCTIONS: dict[Any, int] = {
    aten.amax.default: 1, aten.max.dim: 1, aten.max.default: 1,
    aten.amin.default: -1, aten.min.dim: -1, aten.min.default: -1,
}  # fmt: skip
#: Maxima of a single argument.
MAXIMA = frozenset({*REDUCTIONS, *POOLS, *ADAPTIVE_POOLS})

#: The most arguments of one maximum; the time grows with the square.
MAX_SIZE = 32
#: Points and weights of the mean over a standard normal number (Gauss-Hermite).
NORMAL_POINTS = ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6))


def maximum(
    z: Tensor,
    v: Tensor,
    shift: Tensor | None,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return ``function(z, *args, **kwargs)``; the moments matter to the rule only."""
    return function(z, *args, **kwargs)


def maximum_rule(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """S for the argument of the maximum and T for its variance."""
    r, x, v, shift = with_moments(reference, sample)
    function, no_multipliers = inner_function(operation), [None] * (len(sample) - 2)
    sign, grad = REDUCTIONS.get(function.target), values_grad(grad)
    if sign is None:
        windows = windows_of(function, r, grad)

        def of_windows() -> tuple[Tensor, Tensor]:
            r_w, x_w = (windows.gather(value, -math.inf) for value in (r, x))
            v_w, shift_w = (windows.gather(value, 0.0) for value in (v, shift))
            return smoothed_max_multipliers(r_w, x_w, v_w, shift_w)

        slopes = cached_between(operation, reference[0], sample[0], of_windows)
        grads = [windows.backward(slope, grad, r.shape) for slope in slopes]
        return (*grads, *no_multipliers)
    dims = reduced_dims(function, r)

    def of_dims() -> tuple[Tensor, Tensor]:
        values = sign * r, sign * x, v, sign * shift
        of_mean, of_variance = over_dims(smoothed_max_multipliers, dims, *values)
        return of_mean, sign * of_variance

    slopes = cached_between(operation, reference[0], sample[0], of_dims)
    grad = restore_dims(function, grad, dims)
    return (*(grad * slope for slope in slopes), *no_multipliers)


def with_moments(reference: Tensors, sample: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both endpoints of an argument, its variance and its shift, in one shape."""
    (r, *_), (x, v, *shifts) = reference, sample
    shift = shifts[0].expand_as(r) if shifts else torch.zeros_like(r)
    return r, x.expand_as(r), v.expand_as(r), shift


def over_dims(
    multipliers: Callable[..., tuple[Tensor, Tensor]], dims: list[int], *values: Tensor
) -> tuple[Tensor, Tensor]:
    """Return S and T over some dimensions, by a function of the last dimension of values."""
    count = values[0].dim()
    last = list(range(count - len(dims), count))
    shape = values[0].movedim(dims, last).shape
    slices = (value.movedim(dims, last).flatten(last[0]) for value in values)
    of_mean, of_variance = (
        slope.reshape(shape).movedim(last, dims) for slope in multipliers(*slices)
    )
    return of_mean, of_variance


def mean_slopes(
    slopes: Callable[[Tensor, Tensor], Tensor], r: Tensor, x: Tensor, v: Tensor, shift: Tensor
) -> Tensor:
    """Return ``slopes(mean, variance)``, averaged over the share t of the terms switched."""
    total = torch.zeros_like(r)
    for t, weight in GAUSS_LEGENDRE:
        mean = torch.where(r == x, r, torch.lerp(r, x, t)) + 4 * t * (1 - t) * shift
        total += weight * slopes(mean, t * (1 - t) * v)
    return total


def smoothed_max_multipliers(
    r: Tensor, x: Tensor, v: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return S and T of the maximum over the last dimension.

    Parameters
    ----------
    r, x : Tensor
        The arguments at both endpoints; -inf stands for padding.
    v : Tensor
        Their variances, of the shape of both.
    shift : Tensor
        How far their means are from the straight line where half of the terms are switched.
    """
    game = max_multiplier(r, x)
    if r.shape[-1] > MAX_SIZE:
        return game, torch.zeros_like(game)
    change, slopes = finite_change(r, x), mean_slopes(chances, r, x, v, shift)
    y_r, y_x = r.amax(-1, keepdim=True), x.amax(-1, keepdim=True)
    required = torch.where(y_r == y_x, 0.0, y_x - y_r)
    largest = MAX_RATIO * (1 + torch.maximum(y_r.abs(), y_x.abs()))
    return with_rest(slopes, game, change, v, required, largest)


def with_rest(
    slopes: Tensor, plain: Tensor, change: Tensor, v: Tensor, required: Tensor, largest: Tensor
) -> tuple[Tensor, Tensor]:
    """Return slopes and the multipliers of `v` that give the rest of a required change.

    Parameters
    ----------
    slopes, plain : Tensor
        Multipliers of the arguments, in the last dimension; those that add up without a rest are
        used where the rest has no digits.
    change, v : Tensor
        The changes of the arguments, and their variances.
    required, largest : Tensor
        The change of the output, and the largest size of the attributions.
    """
    parts = slopes * change
    spread = (slopes * v).sum(-1, keepdim=True)
    rest = slopes * ((required - parts.sum(-1, keepdim=True)) / spread)
    size = parts.abs().sum(-1, keepdim=True)
    usable = (spread > 1024 * torch.finfo(v.dtype).tiny) & spread.isfinite() & (size <= largest)
    usable = usable & rest.isfinite().all(-1, keepdim=True)
    return torch.where(usable, slopes, plain), torch.where(usable, rest, 0.0)


def chances(
    mean: Tensor, variance: Tensor, points: Sequence[tuple[float, float]] = NORMAL_POINTS
) -> Tensor:
    """Return the chance of each of the last dimension to be the largest of independent normals.

    Parameters
    ----------
    mean, variance : Tensor
    points : sequence of (float, float)
        Points and weights of the mean over a standard normal number.
    """
    deviation = variance.sqrt()
    chance = torch.zeros_like(mean)
    for point, weight in points:
        value = mean + point * deviation
        distance = (value.unsqueeze(-1) - mean.unsqueeze(-2)) / deviation.unsqueeze(-2)
        larger = torch.special.ndtr(distance.nan_to_num_(0.0))
        larger.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        chance += weight * larger.prod(-1)
    chance = chance.masked_fill(mean == -math.inf, 0.0)
    return chance / chance.sum(-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)


RULES[maximum] = Rule("smoothed maximum", maximum_rule)
