"""Products and quotients of two computed tensors: the derivative at the midpoint.

For a bilinear y = a * b the vector-Jacobian product at ((a_x + a_r)/2, (b_x + b_r)/2) restores
y_x - y_r exactly and is the Shapley value of the two-player game (a, b).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached_between
from fxshap.rules.core.cancellation import (
    may_cancel,
    midpoint_or_sequential,
    sequential_factors,
    sums_of_ends,
    term_by_term,
)
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import RuleFn, Target, Tensors, rule
from fxshap.rules.core.secants import midpoint, scale
from fxshap.rules.core.tracing import any_or_tracing

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
            return midpoint_or_sequential(operation, reference, sample, grad, places)
        return midpoint(operation, reference, sample, grad)

    rule(*targets, linear_in=((first, *others), (second, *others)), name="product")(multiply)


Product = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def factors(*targets: Target) -> Callable[[Product], RuleFn]:
    """Declare a bilinear operation of two tensors with its own vector-Jacobian product."""

    def declare(product: Product) -> RuleFn:
        def multiply(
            operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
        ) -> tuple[Tensor | None, ...]:
            if grad.is_complex():  # a real factor of a complex product has a real gradient
                return midpoint(operation, reference, sample, grad)
            a, b, *most = cached_between(
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
    a, b = cached_between(operation, a_r, a_x, lambda: (a_r + a_x, b_r + b_x))
    mixed = may_cancel(a_r, b_r, a_x, b_x) | may_cancel(a_x, b_x, a_r, b_r)
    if any_or_tracing(mixed):
        a, b = sequential_factors((a_r, b_r), (a_x, b_x), (a, b))
        return scale(half, b).sum_to_size(a_r.shape), scale(half, a).sum_to_size(b_r.shape)
    return (half * b).sum_to_size(a_r.shape), (half * a).sum_to_size(b_r.shape)


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
    if any_or_tracing(far):
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
