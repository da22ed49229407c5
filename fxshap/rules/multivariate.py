"""Functions of a few numbers, element by element: the exact Shapley values of these numbers.

The players of ``z = f(a, b, ...)`` are its k arguments. With v(S) the value of f where those in S
are at the sample and the others at the reference (Shapley 1953)

    phi_i = sum over S without i of  |S|! (k - 1 - |S|)! / k!  (v(S and i) - v(S))

and the multiplier of an argument is phi_i over its difference. For two, phi_a is the mean of its
change before and after that of b. k is at most 3, so that f is computed at 8 points at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from fxshap.rules.core.cancellation import MIXED, extremes, largest_other
from fxshap.rules.core.correction import correct
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import Target, Tensors, rule
from fxshap.rules.core.tracing import any_unless_tracing

aten = torch.ops.aten


def shares(
    function: Callable[..., Tensor],
    r: Sequence[Tensor],
    x: Sequence[Tensor],
    unit: Tensor | float = 1.0,
) -> tuple[list[Tensor], Tensor]:
    """Return what every argument is owed of ``function(*x) - function(*r)``, and rounding.

    Where a mixture of the two ends is outside the domain (a negative number to a fractional
    power), those that moved are owed equal parts. For mixtures that are huge see :func:`mirrored`.

    Parameters
    ----------
    function : callable
        Of as many tensors of one shape as `r` and `x` have; returns one of that shape.
    r, x : sequence of Tensor
        The arguments at the reference and at the sample, of that shape.
    unit : Tensor or float
        What a value of 1 is.

    Returns
    -------
    list of Tensor
        One for every argument; they sum to the difference.
    Tensor
        How much of them may be rounding of the values of `function`.
    """
    k = len(r)
    value = {
        there: function(*(b if at else a for at, a, b in zip(there, r, x, strict=True)))
        for there in product((False, True), repeat=k)
    }
    change = value[(True,) * k] - value[(False,) * k]
    moved = torch.stack([a != b for a, b in zip(r, x, strict=True)])
    equal = change / moved.sum(0).clamp_min(1)
    inside = torch.stack(list(value.values())).isfinite().all(0)
    value = mirrored(value, unit)
    found = []
    for i in range(k):
        owed = torch.zeros_like(change)
        for there in value:
            if not there[i]:
                size = sum(there)
                weight = math.factorial(size) * math.factorial(k - 1 - size) / math.factorial(k)
                joined = (*there[:i], True, *there[i + 1 :])
                owed = owed + weight * (value[joined] - value[there])
        found.append(torch.where(inside, owed, torch.where(moved[i], equal, 0.0)))
    largest = torch.stack(list(value.values())).abs().amax(0)
    return found, largest * (4 * torch.finfo(change.dtype).eps)


Game = dict[tuple[bool, ...], Tensor]


def mirrored(value: Game, unit: Tensor | float) -> Game:
    """Let numbers move in the orders alone that do not pass something huge.

    A mixture S that is larger than :func:`.products.most_beside` allows beside both ends, such as
    the quotient of 1e30 and 2 on the way from 1e30 / 1e30 to 1 / 2, would be owed and cancel, and
    take the digits of the change with it. With N for everything and 0 for nothing, it becomes

        v(S) = v(N) + v(0) - v(N without S)

    for which the Shapley values still sum to v(N) - v(0), and those of two numbers are the change
    of each in the order that passes N without S. It is the mean of both ends where that is huge
    as well.
    """
    *_, everything = value
    nothing = tuple(not at for at in everything)
    ends = value[everything], value[nothing]
    most = unit * largest_other(torch.maximum(*(end.abs() for end in ends)) / unit)
    huge = {there: v.isfinite() & (v.abs() > most) for there, v in value.items()}
    if not any_unless_tracing(torch.stack(list(huge.values()))):
        return value
    found = {}
    for there, v in value.items():
        others = tuple(not at for at in there)
        mirror = torch.where(huge[others], (ends[0] + ends[1]) / 2, sum(ends) - value[others])
        found[there] = torch.where(huge[there], mirror, v)
    return found


def over_differences(
    owed: Sequence[Tensor],
    slopes: Sequence[Tensor | None],
    r: Sequence[Tensor],
    x: Sequence[Tensor],
    rounding: Tensor,
) -> tuple[list[Tensor], bool]:
    """Divide what is owed by differences; close by, by no more than its rounding, take `slopes`.

    `slopes` are derivatives at the midpoint, as in :func:`.univariate.smooth`. Also returned is
    whether something is still owed: for a jump over a difference that is none, as from -0 to 0, or
    so small that the quotient is no number.
    """
    found, lacking = [], []
    steepest = torch.finfo(rounding.dtype).max / max(rounding.numel(), 1)
    for share, slope, a, b in zip(owed, slopes, r, x, strict=True):
        d = b - a
        quotient = torch.where(d == 0, 0.0, share / d)
        if slope is not None:
            close = ((slope * d - share).abs() <= rounding) & slope.isfinite()
            quotient = torch.where(close, slope, quotient)
        bounded = quotient.clamp(-steepest, steepest)
        lacking.append(((bounded != quotient) | ((d == 0) & (share != 0))).any())
        found.append(bounded)
    return found, any_unless_tracing(torch.stack(lacking))


def of_numbers(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Exact Shapley values of the numbers that an element is computed from."""
    if grad.is_complex() or any(r.is_complex() for r in reference):
        return generic(operation, reference, sample, grad)
    r = [value.expand(grad.shape) for value in reference]
    x = [value.expand(grad.shape) for value in sample]

    def value(*point: Tensor) -> Tensor:
        found = operation(*point)
        assert isinstance(found, Tensor)
        return found

    owed, rounding = shares(value, r, x)
    middle = [torch.lerp(a, b, 0.5) for a, b in zip(r, x, strict=True)]
    slopes = vjp(operation, middle, torch.ones_like(grad))
    multipliers, lacking = over_differences(owed, slopes, r, x, rounding)
    found: list[Tensor | None] = [
        torch.where(grad == 0, 0.0, grad * m).sum_to_size(end.shape)
        for m, end in zip(multipliers, reference, strict=True)
    ]
    sample = [end.expand_as(other) for end, other in zip(sample, reference, strict=True)]
    return correct(operation, reference, sample, grad, found) if lacking else tuple(found)


def numberwise(*targets: Target) -> None:
    """Declare functions of two or three numbers, element by element, broadcast."""
    rule(*targets, name="numbers")(of_numbers)


numberwise(
    aten.atan2, aten.arctan2, aten.hypot, aten.copysign, aten.xlogy.Tensor,
    aten.special_xlogy, aten.special_xlog1py, aten.pow.Tensor_Tensor, aten.fmod, aten.remainder,
    aten.clamp.Tensor, aten.clip.Tensor,
    aten.div.Tensor_mode, aten.div.Scalar_mode, aten.divide.Tensor_mode, aten.divide.Scalar_mode,
)  # fmt: skip


# --- sampling an image at computed points -------------------------------------------------------


@rule(
    aten.grid_sampler,
    aten.grid_sampler_2d,
    aten.grid_sampler_3d,
    linear_in=((0,),),
    name="sampling",
)
def grid_sampler(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """y = W(p) v: a product of the weights at every point p and the image v.

    The change is W_bar dv + dW v_bar with bars for the mean of both ends. The first is the image's.
    At one point the second is a number, of the cotangent's channels together, and a function of the
    coordinates of that point alone, which get their exact Shapley values (Jaderberg et al. 2015,
    eq. 5, for the weights). What an image of huge numbers has at the points of the other end may be
    what neither end has: see :func:`image_first`.
    """
    sample = [x.expand_as(r) for r, x in zip(reference, sample, strict=True)]
    both = len(reference) == 2
    image_r, image_x = (end[0] if both else operation["input"] for end in (reference, sample))
    points_r, points_x = reference[-1], sample[-1]

    grads: Sequence[Tensor] = (grad / 2, grad / 2)
    images: Sequence[tuple[Tensor, Tensor]] = [((image_r + image_x) / 2, grad)]
    if both and any_unless_tracing(
        torch.maximum(extremes(image_r)[1], extremes(image_x)[1]) > MIXED
    ):
        first = image_first(operation, reference, sample)
        grads = grad * first, grad * (1 - first)
        images = [(image_x, grads[0]), (image_r, grads[1])]

    def at(points: Tensor) -> Tensor:
        """Sample, and weigh the channels by the cotangent: one number a point."""
        total = torch.zeros_like(grad)
        for image, weights in images:
            out = operation(image, points) if both else operation(points)
            assert isinstance(out, Tensor)
            total = total + torch.where(weights == 0, 0.0, weights * out)
        return total.sum(1)

    ends = points_r.unbind(-1), points_x.unbind(-1)
    unit = grad.abs().sum(1)
    owed, rounding = shares(lambda *p: at(torch.stack(p, -1)), *ends, unit)
    with torch.enable_grad():
        between = torch.lerp(points_r, points_x, 0.5).detach().requires_grad_()
        (slope,) = torch.autograd.grad(at(between).sum(), between)
    multipliers, lacking = over_differences(owed, slope.unbind(-1), *ends, rounding)
    found: list[Tensor | None] = [torch.stack(multipliers, -1)]
    if both:
        parts = [
            vjp(operation, (image_r, points), part)[0]
            for points, part in zip((points_r, points_x), grads, strict=True)
        ]
        assert parts[0] is not None and parts[1] is not None
        found = [parts[0] + parts[1], *found]
    return correct(operation, reference, sample, grad, found) if lacking else tuple(found)


def image_first(operation: Operation, reference: Tensors, sample: Tensors) -> Tensor:
    """Say where the image moves before the points: 1 and 0, or 1/2 for the mean of both orders.

    One order alone where the other passes something huge, as in :func:`.products.in_one_order`.
    """
    (image_r, points_r), (image_x, points_x) = reference, sample
    pairs = [(image, points) for image in (image_r, image_x) for points in (points_r, points_x)]
    y_r, points_moved, image_moved, y_x = (operation(*pair) for pair in pairs)
    assert isinstance(y_r, Tensor) and isinstance(y_x, Tensor)
    assert isinstance(points_moved, Tensor) and isinstance(image_moved, Tensor)
    most = largest_other(torch.maximum(y_r.abs(), y_x.abs()))
    last = torch.where(image_moved.abs() > most, 0.0, 0.5)
    return torch.where(points_moved.abs() > most, 1.0, last).to(y_r.dtype)
