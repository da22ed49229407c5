"""Products and quotients of two computed tensors: the derivative at the midpoint.

For a bilinear y = a * b the vector-Jacobian product at ((a_x + a_r)/2, (b_x + b_r)/2) restores
y_x - y_r exactly and is the Shapley value of the two-player game (a, b).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxshap.rules.core.generic import (
    by_lines,
    common_rows,
    correct,
    generic,
    in_rows,
    lines_of,
    out_of_rows,
)
from fxshap.rules.core.operation import (
    Operation,
    keep,
    keep_between,
    may_hold,
    rarely_holds,
    vjp,
)
from fxshap.rules.core.registry import Multiply, Target, Tensors, rule
from fxshap.rules.univariate import scale

aten = torch.ops.aten


def bilinear(
    *targets: Target, factors: tuple[int, int] = (0, 1), others: tuple[int, ...] = ()
) -> None:
    """Declare operations linear in each of two factors, and in `others` beside either.

    Parameters
    ----------
    *targets : operator
    factors : pair of int
        Argument positions of the two factors.
    others : tuple of int
        Positions of arguments that are added, such as a bias.

    Raises
    ------
    RuleError
        If a target is not an operator.

    Examples
    --------
    >>> import torch, fxshap
    >>> fxshap.rules.bilinear(torch.ops.aten.outer)
    """
    first, second = factors

    def multiply(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Any
    ) -> tuple[Tensor | None, ...]:
        slots = operation.slots
        if {first, second} <= {*slots} <= {first, second, *others} and not grad.is_complex():
            places = slots.index(first), slots.index(second)
            return midpoint_or_one_order(operation, reference, sample, grad, places)
        return midpoint(operation, reference, sample, grad)

    rule(*targets, linear_in=((first, *others), (second, *others)), name="product")(multiply)


def midpoint(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product at the midpoint, exact for operations of degree two."""
    middle = [torch.lerp(r, x.expand_as(r), 0.5) for r, x in zip(reference, sample, strict=True)]
    return vjp(operation, middle, grad)


Product = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def factors(*targets: Target) -> Callable[[Product], Multiply]:
    """Declare a bilinear operation of two tensors with its own vector-Jacobian product."""

    def declare(product: Product) -> Multiply:
        def multiply(
            operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
        ) -> tuple[Tensor | None, ...]:
            if grad.is_complex():  # a real factor of a complex product has a real gradient
                return midpoint(operation, reference, sample, grad)
            a, b, *most = keep_between(
                operation, reference[0], sample[0], lambda: sums_of_ends(reference, sample)
            )
            if most:
                return term_by_term(reference, sample, grad, *most)
            # The halves of the midpoints go into the cotangent, which is often smaller.
            return product(a, b, grad * 0.5)

        rule(*targets, linear_in=((0,), (1,)), name="product")(multiply)
        return multiply

    return declare


@rule(aten.mul, linear_in=((0,), (1,)), name="product")
def mul(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """y = a * b, broadcast; see :func:`in_one_order` for what is huge."""
    if grad.is_complex():  # a real factor of a complex product has a real gradient
        return midpoint(operation, reference, sample, grad)
    (a_r, b_r), (a_x, b_x) = reference, sample
    half = grad * 0.5
    a, b = keep_between(operation, a_r, a_x, lambda: (a_r + a_x, b_r + b_x))
    mixed = may_cancel(a_r, b_r, a_x, b_x) | may_cancel(a_x, b_x, a_r, b_r)
    if may_hold(mixed):
        a, b = in_one_order((a_r, b_r), (a_x, b_x), (a, b))
        return scale(half, b).sum_to_size(a_r.shape), scale(half, a).sum_to_size(b_r.shape)
    return (half * b).sum_to_size(a_r.shape), (half * a).sum_to_size(b_r.shape)


#: How many times larger than at both ends, and than 1, a product of mixed ends may be.
MIXED = 1e4
#: How many times larger than what is not 0 at both ends: more costs the last digits of its change.
LOST = 1e6


def most_beside(ends: Tensor, mixed: float = MIXED) -> Tensor:
    """Return how large a number that neither end shows may be, for the larger size of the ends."""
    most = torch.minimum(mixed * ends.clamp(min=1), LOST * ends)
    return torch.where(ends == 0, mixed, most)


def may_cancel(a_r: Tensor, b_r: Tensor, a_x: Tensor, b_x: Tensor) -> Tensor:
    """Say whether a_r b_x may be more than :func:`most_beside` allows, by the extremes alone.

    Or no number, as the logarithm in ``where(a > 0, b * log(a), 0)``.
    """
    high_a, high_b = extremes(a_r)[1], extremes(b_x)[1]
    lost = (high_b > LOST * extremes(b_r)[0]) & (high_a > LOST * extremes(a_x)[0])
    return ~(high_a * high_b <= MIXED) | lost


def in_one_order(
    reference: Tensors,
    sample: Tensors,
    sums: tuple[Tensor, Tensor],
    mixed: float = MIXED,
    most: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Let the factors of a product move in one order where the other passes something huge.

    The midpoint is the mean of both orders. A gate that is open at one end and shut at the other,
    where what it holds back is huge, passes in one of them a product that neither end has, and of
    which the attributions would hold only the rounding errors.

    Parameters
    ----------
    reference, sample : pair of Tensor
        Both factors at both ends.
    sums : pair of Tensor
        Each factor at the one end plus that at the other, which are returned where nothing is huge.
    mixed : float
        How many times larger than at both ends, and than 1, a product of mixed ends may be.
    most : Tensor, optional
        How large it may be, in place of that.
    """
    (a_r, b_r), (a_x, b_x) = reference, sample
    if most is None:
        most = most_beside(torch.maximum((a_r * b_r).abs(), (a_x * b_x).abs()), mixed)
    a_moves_first, b_moves_first = (a_r * b_x).abs() > most, (a_x * b_r).abs() > most
    a = torch.where(a_moves_first, 2 * a_x, torch.where(b_moves_first, 2 * a_r, sums[0]))
    b = torch.where(a_moves_first, 2 * b_r, torch.where(b_moves_first, 2 * b_x, sums[1]))
    return a, b


def sums_of_ends(reference: Tensors, sample: Tensors) -> tuple[Tensor, ...]:
    """Return both factors of a matrix product at the one end plus those at the other.

    Where mixed ends have something huge, also :func:`most_beside` both ends.
    """
    (a_r, b_r), (a_x, b_x) = reference, sample
    sums = a_r + a_x, b_r + b_x
    if not rarely_holds(largest_mixed((a_r, a_x), (b_r, b_x)) > MIXED):
        return sums
    a_r, b_r, a_x, b_x = (value.abs() for value in (a_r, b_r, a_x, b_x))
    most = most_beside(torch.maximum(a_r @ b_r, a_x @ b_x))
    return (*sums, most) if may_hold((a_r @ b_x > most) | (a_x @ b_r > most)) else sums


def term_by_term(
    reference: Tensors, sample: Tensors, grad: Tensor, most: Tensor
) -> tuple[Tensor, Tensor]:
    """Multipliers of a matrix product, each of whose terms is one as of :func:`mul`.

    A weight of attention that vanishes where its value is huge, for one.
    """
    row, column = reference[0].dim() == 1, reference[1].dim() == 1
    half = grad * 0.5
    half, most = (v.unsqueeze(-1) if column else v for v in (half, most))
    half, most = (v.unsqueeze(-2) if row else v for v in (half, most))
    ends = [
        (a.unsqueeze(0) if row else a, b.unsqueeze(-1) if column else b)
        for a, b in (reference, sample)
    ]
    found_a, found_b = (torch.zeros_like(factor) for factor in ends[0])
    for k in range(found_a.shape[-1]):
        (a_r, b_r), (a_x, b_x) = ((a[..., k, None], b[..., k, None, :]) for a, b in ends)
        a, b = in_one_order((a_r, b_r), (a_x, b_x), (a_r + a_x, b_r + b_x), most=most)
        found_a[..., k, None] = (half * b).sum_to_size(a_r.shape)
        found_b[..., k, None, :] = (half * a).sum_to_size(b_r.shape)
    return found_a.reshape(reference[0].shape), found_b.reshape(reference[1].shape)


def extremes(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest absolute value, computed once for an end."""

    def both(v: Tensor) -> tuple[Tensor, Tensor]:
        least, most = v.abs().aminmax() if v.numel() else (v.new_ones(()), v.new_zeros(()))
        return least, most

    return keep(value, "extremes", both)


Ends = tuple[Tensor, Tensor]


def largest_mixed(a: Ends, b: Ends) -> Tensor:
    """Return what no product of mixed ends is larger than, by the extremes alone."""
    (a_r, a_x), (b_r, b_x) = ([extremes(end)[1] for end in factor] for factor in (a, b))
    return torch.maximum(a_r * b_x, a_x * b_r)


def midpoint_or_one_order(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any, places: tuple[int, int]
) -> tuple[Tensor | None, ...]:
    """Take the midpoint, where the factors at `places` are huge :func:`rows_in_one_order`."""
    if rarely_holds(largest_mixed(*((reference[p], sample[p]) for p in places)) > LOST):
        return rows_in_one_order(operation, reference, sample, grad, places)
    return midpoint(operation, reference, sample, grad)


def rows_in_one_order(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor, places: tuple[int, int]
) -> tuple[Tensor | None, ...]:
    """Let the factors of each row move in one order where the other passes something huge.

    As :func:`in_one_order`, for sums of products whose terms share an order. For t in [0, 1] the
    vector-Jacobian product at a = (1 - t) a_x + t a_r and b = t b_x + (1 - t) b_r restores the
    difference, with the weight t of the order in which b moves first. It is 1/2 at the midpoint,
    and 0 or 1 in rows whose other order passes more than :func:`most_beside` allows. Where both
    orders do, what is rounded is made up for as in :mod:`.generic`.

    Parameters
    ----------
    places : pair of int
        Where both factors are among the varying arguments.
    """
    sample = [x.expand_as(r) for r, x in zip(reference, sample, strict=True)]
    first, second = places

    def largest(*, swapped: int | None = None, at: Tensors = reference) -> Tensor:
        """Largest output of each row that is asked about, of shape (rows, 1)."""
        other = sample if at is reference else reference
        out = operation(*(other[p] if p == swapped else v for p, v in enumerate(at)))
        assert isinstance(out, Tensor)
        rows = in_rows(out.abs().masked_fill(grad == 0, 0.0), operation.rows[-1], count)
        return rows.amax(1, keepdim=True).nan_to_num(math.inf, math.inf)

    def spread(value: Tensor, place: int) -> Tensor:
        """Give a number of each row to all that a varying argument has of that row."""
        like = reference[place]
        wide = value.expand(count, like.numel() // count)
        return out_of_rows(wide, like, operation.rows[place])

    count = common_rows(reference, operation.rows[:-1], grad, operation.rows[-1])
    most = most_beside(torch.maximum(largest(), largest(at=sample)))
    most = most.clamp(max=torch.finfo(most.dtype).max)  # what overflows is more
    a_first, b_first = largest(swapped=first), largest(swapped=second)
    one, both = torch.maximum(a_first, b_first) > most, torch.minimum(a_first, b_first) > most
    t = torch.where(one, (a_first > b_first).to(grad.dtype), 0.5)
    point = [torch.lerp(r, x, 0.5) for r, x in zip(reference, sample, strict=True)]
    for place, weight in ((first, 1 - t), (second, t)):
        point[place] = torch.lerp(reference[place], sample[place], spread(weight, place))
    found = vjp(operation, point, grad)
    corrected = correct(operation, reference, sample, grad, list(found))
    return tuple(
        None if m is None or c is None else torch.where(spread(both, place), c, m)
        for place, (m, c) in enumerate(zip(found, corrected, strict=True))
    )


@factors(aten.bmm)
def bmm(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """y = a @ b, one matrix a batch entry."""
    return torch.bmm(grad, b.mT), torch.bmm(a.mT, grad)


@factors(aten.matmul, aten.linalg_matmul, aten.mm)
def matmul(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """y = a @ b, broadcast over leading dimensions; vectors are matrices of one row or column."""
    row, column = a.dim() == 1, b.dim() == 1
    grad = grad.unsqueeze(-1) if column else grad
    grad = grad.unsqueeze(-2) if row else grad
    left, right = a.unsqueeze(0) if row else a, b.unsqueeze(-1) if column else b
    grad_a = torch.matmul(grad, right.mT).sum_to_size(left.shape)
    grad_b = torch.matmul(left.mT, grad).sum_to_size(right.shape)
    return grad_a.reshape(a.shape), grad_b.reshape(b.shape)


bilinear(aten.mv, aten.dot, aten.vdot, aten.inner, aten.outer, aten.ger,
         aten.kron, aten.cross, aten.linalg_cross, aten.linalg_vecdot,
         aten.tensordot, aten.multiply)  # fmt: skip
bilinear(
    aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.conv_transpose1d,
    aten.conv_transpose2d, aten.conv_transpose3d, others=(2,),
)  # fmt: skip
bilinear(aten.addmm, aten.addmv, aten.addbmm, aten.baddbmm, aten.addr, aten.addcmul,
         factors=(1, 2), others=(0,))  # fmt: skip
bilinear(aten.bilinear, others=(3,))


#: Points on the way through a product; more factors than twice as many are rounded.
MOST_POINTS = 64


def multilinear(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any, degree: int
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian products averaged from reference to sample, for a product of many factors.

    What is linear in every factor is its own multilinear extension, whose gradient averaged along
    the diagonal is the Shapley value (Owen 1972, theorem 5). The gradient is of degree n - 1, which
    Gauss-Legendre quadrature integrates exactly with n / 2 points. Beyond :data:`MOST_POINTS` what
    is missing, and what is rounded, is made up for as in :mod:`.generic`.
    """
    points, weights = np.polynomial.legendre.leggauss(min(-(-degree // 2), MOST_POINTS))
    total = [torch.zeros_like(r) for r in reference]
    ends = [(r, x.expand_as(r)) for r, x in zip(reference, sample, strict=True)]
    for point, weight in zip(points, weights, strict=True):
        middle = [torch.lerp(r, x, float(point + 1) / 2) for r, x in ends]
        for place, found in enumerate(vjp(operation, middle, grad)):
            if found is not None:
                # What overflows on the way, or has no derivative there, counts nothing.
                total[place].add_(found.nan_to_num(0.0, 0.0, 0.0), alpha=float(weight) / 2)
    return correct(operation, reference, [x for _, x in ends], grad, list(total))


@rule(aten.prod, aten.cumprod, name="product of many")
def product_of_many(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Product along a dimension, or of everything so far; see :func:`multilinear`.

    Attributions that are more than :func:`most_beside` allows cancel: the path passes products that
    are huge where neither end is. Such lines, and those that overflow where every factor is as
    large as it ever is, take :func:`in_order_of_growth`.
    """
    (r,) = reference
    dim = operation.get("dim")
    degree = math.prod(r.shape) if dim is None else r.shape[dim] if r.dim() else 1
    found = multilinear(operation, reference, sample, grad, max(degree, 1))
    (m,) = found
    if m is None or m.is_complex() or not m.numel():
        return found
    so_far = operation.target is aten.cumprod.default
    g = lines_of(grad, dim) if so_far else grad.reshape(-1, 1)
    lines = [g, *(lines_of(end.expand_as(r), dim).to(g.dtype) for end in (r, *sample))]
    ends = [line.cumprod(-1) if so_far else line.prod(-1, keepdim=True) for line in lines[1:]]
    most = (g.abs() * most_beside(torch.maximum(*(end.abs() for end in ends)))).sum(-1)
    parts = lines_of(m, dim) * (lines[2] - lines[1])
    # What overflows on the way has been left out of the parts.
    farthest = torch.maximum(lines[1].abs(), lines[2].abs()).prod(-1)
    excess = ~(parts.abs().amax(-1) <= most) | ~farthest.isfinite()
    if not rarely_holds(excess):
        return found
    target = aten.cumprod.default if so_far else aten.prod.dim_int

    def usual(g: Tensor, r: Tensor, x: Tensor) -> Tensor:
        bound, _ = Operation.bind(target, (r, -1))
        (m,) = multilinear(bound, [r], [x], g if so_far else g.squeeze(-1), r.shape[-1])
        assert m is not None
        return m

    m = by_lines(dim, excess, usual, in_order_of_growth, *lines, like=r)
    return (m.to(r.dtype),)


def in_order_of_growth(grad: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """Multipliers of a product along the last dimension, or of all products so far.

    The factors move one by one, those that shrink most first. The product then falls, and after
    that rises, and is never larger than at one of the ends.

    Parameters
    ----------
    grad : Tensor
        Of one product a line, or of as many as there are factors.
    r, x : Tensor
        Of shape (lines, factors).
    """
    out = torch.zeros_like(r)
    growth = (x / r).abs().nan_to_num(1.0, math.inf)
    for j in range(grad.shape[-1]):
        count = j + 1 if grad.shape[-1] > 1 else r.shape[-1]
        order = growth[:, :count].argsort(dim=-1, stable=True)
        moved, waiting = x.gather(-1, order), r.gather(-1, order)
        one = torch.ones_like(moved[:, :1])
        before = torch.cat([one, moved[:, :-1]], -1).cumprod(-1)
        after = torch.cat([one, waiting[:, 1:].flip(-1)], -1).cumprod(-1).flip(-1)
        out.scatter_add_(-1, order, before * after * grad[:, j : j + 1])
    return out


@rule(aten.linalg_det, aten.det)
def determinant(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Linear in each entry, of degree the number of rows in all together: see :func:`multilinear`.

    Every term of the Leibniz formula is a product of different entries.
    """
    return multilinear(operation, reference, sample, grad, max(reference[0].shape[-1], 1))


@rule(aten.einsum, linear_in=(), name="product")
def einsum(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Midpoint for one or two computed operands, :func:`multilinear` for more."""
    if len(reference) == 2 and not grad.is_complex():
        return midpoint_or_one_order(operation, reference, sample, grad, (0, 1))
    if len(reference) <= 2:
        return midpoint(operation, reference, sample, grad)
    return multilinear(operation, reference, sample, grad, len(reference))


@rule(aten.lerp, linear_in=((0, 1), (2,)))
def lerp(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """a + w (b - a): bilinear in w and (a, b)."""
    return midpoint(operation, reference, sample, grad)


#: How many times larger a divisor may be at one end than at the other to count as independent.
FAR = 100.0


@rule(aten.div, aten.divide, aten.true_divide, linear_in=((0,),))
def div(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """a / b is the product of a and 1/b, whose secant is -1 / (b_x b_r).

    Where b is more than :data:`FAR` times larger at one end, a is that of y and b instead, as in
    :mod:`.normalisation`: with bars for means, da = y_bar db + b_bar dy. Such b are lengths that a
    is divided by, which nearly vanish with it; a_x / b_r then is what the network never computes.
    """
    if grad.is_complex():
        return generic(operation, reference, sample, grad)
    b_r, b_x = reference[-1], sample[-1]
    slope_b = b_r.reciprocal() * b_x.reciprocal()
    if operation.slots[0] != 0:
        return (scale(grad, -operation["self"] * slope_b).sum_to_size(b_r.shape),)
    a_r, a_x = reference[0], sample[0]
    slopes = (b_r.reciprocal() + b_x.reciprocal()) / 2, -(a_r + a_x) / 2 * slope_b
    sizes = b_r.abs(), b_x.abs()
    far = (torch.maximum(*sizes) > FAR * torch.minimum(*sizes)) & (b_r.sign() == b_x.sign())
    if may_hold(far):
        middle = b_r / 2 + b_x / 2
        others = middle.reciprocal(), -(a_r / b_r / 2 + a_x / b_x / 2) / middle
        slopes = (
            torch.where(far, others[0], slopes[0]),
            torch.where(far, others[1], slopes[1]),
        )
    return tuple(
        scale(grad, slope).sum_to_size(end.shape)
        for slope, end in zip(slopes, (a_r, b_r), strict=True)
    )
