"""Elementwise functions of two or three arguments: the exact Shapley values of the arguments.

The players of ``z = f(a, b, ...)`` are its k arguments. Let v(S) be the value of f where the
arguments in the coalition S are at the sample and the others at the reference. Then (Shapley 1953)

    phi_i = sum over S without i of  |S|! (k - 1 - |S|)! / k!  (v(S and i) - v(S))

and the multiplier of an argument is phi_i divided by its difference x_i - r_i. With two arguments,
phi_a is the mean of the change that a makes before and after b changes. k is at most 3, so that f
is computed at 8 points at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from fxshap.rules.core.cancellation import MAX_MIXED_RATIO, abs_aminmax, intermediate_limit
from fxshap.rules.core.correction import correct
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.tracing import any_unless_tracing

aten = torch.ops.aten


#: The values of a game: a coalition names for each player whether it is at the sample.
CoalitionValues = dict[tuple[bool, ...], Tensor]


def shapley_attributions(
    function: Callable[..., Tensor],
    r: Sequence[Tensor],
    x: Sequence[Tensor],
    unit: Tensor | float = 1.0,
) -> tuple[list[Tensor], Tensor]:
    """Return the Shapley values of ``function(*x) - function(*r)``, and their rounding error.

    Where a coalition is outside the domain of the function (a negative number to a fractional
    power), the arguments that changed get equal parts. :func:`without_huge_coalitions` replaces
    coalitions whose value is huge.

    Parameters
    ----------
    function : callable
        Takes as many tensors of one shape as `r` and `x` have, returns a tensor of that shape.
    r, x : sequence of Tensor
        The arguments at the reference and at the sample, of that shape.
    unit : Tensor or float
        The size of a value that counts as 1.

    Returns
    -------
    list of Tensor
        The Shapley value of every argument; they sum to the difference.
    Tensor
        A bound on the rounding error of each of them.
    """
    k = len(r)
    values = {
        coalition: function(*(b if at else a for at, a, b in zip(coalition, r, x, strict=True)))
        for coalition in product((False, True), repeat=k)
    }
    change = values[(True,) * k] - values[(False,) * k]
    changed = torch.stack([a != b for a, b in zip(r, x, strict=True)])
    equal_part = change / changed.sum(0).clamp_min(1)
    in_domain = torch.stack(list(values.values())).isfinite().all(0)
    values = without_huge_coalitions(values, unit)
    attributions = []
    for i in range(k):
        phi = torch.zeros_like(change)
        for coalition in values:
            if not coalition[i]:
                size = sum(coalition)
                weight = math.factorial(size) * math.factorial(k - 1 - size) / math.factorial(k)
                with_i = (*coalition[:i], True, *coalition[i + 1 :])
                phi = phi + weight * (values[with_i] - values[coalition])
        attributions.append(torch.where(in_domain, phi, torch.where(changed[i], equal_part, 0.0)))
    largest = torch.stack(list(values.values())).abs().amax(0)
    return attributions, largest * (4 * torch.finfo(change.dtype).eps)


def without_huge_coalitions(values: CoalitionValues, unit: Tensor | float) -> CoalitionValues:
    """Replace the values of coalitions that are huge compared with both endpoints.

    A coalition S is huge if v(S) is larger than :func:`.cancellation.intermediate_limit` permits.
    An example is 1e30 / 2 between the endpoints 1e30 / 1e30 and 1 / 2. Its value would enter two
    attributions with opposite signs, and the digits of the change would be lost. With N for all
    players and 0 for none, v(S) is replaced by

        v(N) + v(0) - v(N without S)

    The Shapley values still sum to v(N) - v(0). Those of two players are the changes in the one
    order that passes N without S. Where v(N without S) is huge as well, v(S) is replaced by the
    mean of both endpoints.
    """
    *_, all_players = values
    no_players = tuple(not at for at in all_players)
    y_x, y_r = values[all_players], values[no_players]
    limit = unit * intermediate_limit(torch.maximum(y_x.abs(), y_r.abs()) / unit)
    huge = {coalition: v.isfinite() & (v.abs() > limit) for coalition, v in values.items()}
    if not any_unless_tracing(torch.stack(list(huge.values()))):
        return values
    replaced = {}
    for coalition, v in values.items():
        others = tuple(not at for at in coalition)
        mirrored = torch.where(huge[others], (y_x + y_r) / 2, y_x + y_r - values[others])
        replaced[coalition] = torch.where(huge[coalition], mirrored, v)
    return replaced


def attributions_to_multipliers(
    attributions: Sequence[Tensor],
    slopes: Sequence[Tensor | None],
    r: Sequence[Tensor],
    x: Sequence[Tensor],
    rounding: Tensor,
) -> tuple[list[Tensor], bool]:
    """Divide attributions by differences; take `slopes` where both agree to `rounding`.

    `slopes` are derivatives at the midpoint, which hold where the quotient would cancel, as in
    :func:`.secants.smooth_secant`.

    Returns
    -------
    list of Tensor
        The multiplier of every argument, bounded so that their sum does not overflow.
    bool
        Whether the multipliers lack a part of the change: at a jump without a difference, as from
        -0 to 0, or where the difference is so small that the quotient overflows.
    """
    multipliers, lacking = [], []
    steepest = torch.finfo(rounding.dtype).max / max(rounding.numel(), 1)
    for attribution, slope, a, b in zip(attributions, slopes, r, x, strict=True):
        d = b - a
        quotient = torch.where(d == 0, 0.0, attribution / d)
        if slope is not None:
            close = ((slope * d - attribution).abs() <= rounding) & slope.isfinite()
            quotient = torch.where(close, slope, quotient)
        bounded = quotient.clamp(-steepest, steepest)
        lacking.append(((bounded != quotient) | ((d == 0) & (attribution != 0))).any())
        multipliers.append(bounded)
    return multipliers, any_unless_tracing(torch.stack(lacking))


#: How many times its rounding error a coordinate may be and still count as 0.
NEGLIGIBLE = 16.0


def ill_conditioned(
    r: Sequence[Tensor], x: Sequence[Tensor], attributions: Sequence[Tensor]
) -> list[Tensor]:
    """Return for each coordinate of a point where its part of an angle cannot be its own.

    That is where, compared with the other coordinate, it is rounding noise at both endpoints; and
    where the angle jumps by 2 pi although it hardly moves, so that rounding errors would count
    more than 1e-5 (in float64 1e-12) of the angle.
    """
    eps = torch.finfo(r[0].dtype).eps
    sizes = [torch.maximum(a.abs(), b.abs()) for a, b in zip(r, x, strict=True)]
    least = [torch.minimum(a.abs(), b.abs()) for a, b in zip(r, x, strict=True)]
    return [
        (size <= NEGLIGIBLE * eps * other)
        | ((attribution.abs() > 1) & (size <= eps**0.2 * smallest_other))
        for size, other, smallest_other, attribution in zip(
            sizes, sizes[::-1], least[::-1], attributions, strict=True
        )
    ]


@rule(aten.atan2, aten.arctan2)
def atan2(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The rule of :func:`multivariate`, except at the branch cut.

    The imaginary part of a spectrum is 0 at some frequencies, up to rounding. Where the real part
    is negative, the sign of that noise decides between the angles pi and -pi. What such a
    coordinate changes is attributed to the other one, because its multiplier would be 1/noise.
    """
    if len(reference) < 2:
        return multivariate(operation, reference, sample, grad)
    return shapley_multipliers(operation, reference, sample, grad, ill_conditioned)


@rule(
    aten.hypot, aten.copysign, aten.xlogy.Tensor,
    aten.special_xlogy, aten.special_xlog1py, aten.pow.Tensor_Tensor, aten.fmod, aten.remainder,
    aten.clamp.Tensor, aten.clip.Tensor,
    aten.div.Tensor_mode, aten.div.Scalar_mode, aten.divide.Tensor_mode, aten.divide.Scalar_mode,
    real_only=True,
)  # fmt: skip
def multivariate(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Exact Shapley values of the two or three arguments of each element, with broadcasting."""
    return shapley_multipliers(operation, reference, sample, grad)


#: Returns where each of two arguments leaves its attribution to the other one, as booleans, given
#: both endpoints and the attributions.
LeavesFn = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def shapley_multipliers(
    operation: Operation,
    reference: Tensors,
    sample: Tensors,
    grad: Tensor,
    leaves: LeavesFn | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the cotangents of :func:`multivariate`.

    Parameters
    ----------
    leaves : callable, optional
        Chooses arguments whose attribution goes to the other one.
    """
    r = [value.expand(grad.shape) for value in reference]
    x = [value.expand(grad.shape) for value in sample]

    def value(*point: Tensor) -> Tensor:
        output = operation(*point)
        assert isinstance(output, Tensor)
        return output

    attributions, rounding = shapley_attributions(value, r, x)
    midpoint = [torch.lerp(a, b, 0.5) for a, b in zip(r, x, strict=True)]
    slopes = vjp(operation, midpoint, torch.ones_like(grad))
    if leaves is not None:
        left = leaves(r, x, attributions)
        first, second = (
            torch.where(at, phi, 0.0) for at, phi in zip(left, attributions, strict=True)
        )
        attributions = [attributions[0] - first + second, attributions[1] - second + first]
        slopes = tuple(
            None if s is None else torch.where(at, 0.0, s)
            for at, s in zip(left, slopes, strict=True)
        )
    multipliers, lacking = attributions_to_multipliers(attributions, slopes, r, x, rounding)
    grads: list[Tensor | None] = [
        torch.where(grad == 0, 0.0, grad * m).sum_to_size(value.shape)
        for m, value in zip(multipliers, reference, strict=True)
    ]
    sample = [x.expand_as(r) for r, x in zip(reference, sample, strict=True)]
    return correct(operation, reference, sample, grad, grads) if lacking else tuple(grads)


# --- sampling an image at computed points -------------------------------------------------------


@rule(aten.grid_sampler, aten.grid_sampler_2d, aten.grid_sampler_3d, linear_in=((0,),))
def grid_sampler(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """y = W(p) v: the product of the interpolation weights at every point p and the image v.

    The weights are those of Jaderberg et al. 2015, eq. 5. With a bar for the mean of both
    endpoints, dy = W_bar dv + dW v_bar. The first term is the attribution of the image. The second
    term, weighted by the cotangent and summed over channels, is at each point a function of that
    point's coordinates only; they get its exact Shapley values. An image of huge numbers, sampled
    at the points of the other endpoint, may give values that neither endpoint has: see
    :func:`image_first_weight`.
    """
    sample = [x.expand_as(r) for r, x in zip(reference, sample, strict=True)]
    image_varies = len(reference) == 2
    image_r, image_x = (
        endpoint[0] if image_varies else operation["input"] for endpoint in (reference, sample)
    )
    points_r, points_x = reference[-1], sample[-1]

    grads: Sequence[Tensor] = (grad / 2, grad / 2)
    images: Sequence[tuple[Tensor, Tensor]] = [((image_r + image_x) / 2, grad)]
    if image_varies and any_unless_tracing(
        torch.maximum(abs_aminmax(image_r)[1], abs_aminmax(image_x)[1]) > MAX_MIXED_RATIO
    ):
        weight = image_first_weight(operation, reference, sample)
        grads = grad * weight, grad * (1 - weight)
        images = [(image_x, grads[0]), (image_r, grads[1])]

    def value(points: Tensor) -> Tensor:
        """Return the sum over channels, weighted by the cotangent: one number for each point."""
        total = torch.zeros_like(grad)
        for image, weights in images:
            out = operation(image, points) if image_varies else operation(points)
            assert isinstance(out, Tensor)
            total = total + torch.where(weights == 0, 0.0, weights * out)
        return total.sum(1)

    points_grad, lacking = point_multipliers(value, points_r, points_x, grad.abs().sum(1))
    all_grads: list[Tensor | None] = [points_grad]
    if image_varies:
        terms = [
            vjp(operation, (image_r, points), g)[0]
            for points, g in zip((points_r, points_x), grads, strict=True)
        ]
        assert terms[0] is not None and terms[1] is not None
        all_grads = [terms[0] + terms[1], *all_grads]
    return correct(operation, reference, sample, grad, all_grads) if lacking else tuple(all_grads)


def point_multipliers(
    value: Callable[[Tensor], Tensor], r: Tensor, x: Tensor, unit: Tensor
) -> tuple[Tensor, bool]:
    """Return multipliers of the coordinates of points, the last dimension of r and x.

    The other result and the parameters are those of :func:`attributions_to_multipliers` and
    :func:`shapley_attributions`.
    """
    coordinates = r.unbind(-1), x.unbind(-1)
    attributions, rounding = shapley_attributions(
        lambda *coordinates: value(torch.stack(coordinates, -1)), *coordinates, unit
    )
    with torch.enable_grad():
        midpoint = torch.lerp(r, x, 0.5).detach().requires_grad_()
        (slope,) = torch.autograd.grad(value(midpoint).sum(), midpoint)
    multipliers, lacking = attributions_to_multipliers(
        attributions, slope.unbind(-1), *coordinates, rounding
    )
    return torch.stack(multipliers, -1), lacking


def image_first_weight(operation: Operation, reference: Tensors, sample: Tensors) -> Tensor:
    """Return the weight, per output, of the order in which the image changes before the points.

    It is 1/2, the mean of both orders, and 1 or 0 where the other order passes a huge value, as in
    :func:`.cancellation.sequential_factors`.
    """
    (image_r, points_r), (image_x, points_x) = reference, sample
    pairs = [(image, points) for image in (image_r, image_x) for points in (points_r, points_x)]
    y_r, y_points, y_image, y_x = (operation(*pair) for pair in pairs)  # only one of them changed
    assert isinstance(y_r, Tensor) and isinstance(y_x, Tensor)
    assert isinstance(y_points, Tensor) and isinstance(y_image, Tensor)
    limit = intermediate_limit(torch.maximum(y_r.abs(), y_x.abs()))
    otherwise = torch.where(y_image.abs() > limit, 0.0, 0.5)
    return torch.where(y_points.abs() > limit, 1.0, otherwise).to(y_r.dtype)
