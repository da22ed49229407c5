"""Products and quotients of two computed tensors: the derivative at the midpoint.

For a bilinear y = a * b the vector-Jacobian product at ((a_x + a_r)/2, (b_x + b_r)/2) restores
y_x - y_r exactly. It is the Shapley value (Shapley 1953) of the game whose two players are a and b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached_between
from fxshap.rules.core.cancellation import (
    endpoint_sums,
    matmul_grads_termwise,
    midpoint_or_sequential,
    mixed_product_may_exceed,
    sequential_factors,
)
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import RuleFn, Target, Tensors, rule
from fxshap.rules.core.secants import midpoint, scale
from fxshap.rules.core.tracing import any_or_tracing

aten = torch.ops.aten


def bilinear(
    *targets: Target, factors: tuple[int, int] = (0, 1), others: tuple[int, ...] = ()
) -> None:
    """Declare operations that are linear in each of two factors, jointly with `others`.

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
            positions = slots.index(first), slots.index(second)
            return midpoint_or_sequential(operation, reference, sample, grad, positions)
        return midpoint(operation, reference, sample, grad)

    rule(*targets, linear_in=((first, *others), (second, *others)), name="product")(multiply)


ProductVjp = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def matrix_product(*targets: Target) -> Callable[[ProductVjp], RuleFn]:
    """Declare a matrix product whose vector-Jacobian product is ``function(a, b, grad)``."""

    def declare(function: ProductVjp) -> RuleFn:
        def multiply(
            operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
        ) -> tuple[Tensor | None, ...]:
            if grad.is_complex():  # a real factor of a complex product has a real gradient
                return midpoint(operation, reference, sample, grad)
            # The factor 1/2 of the midpoints goes into the sums or into the cotangent, whichever
            # are smaller.
            halves_sums = sum(r.numel() for r in reference) < grad.numel()

            def scaled_sums() -> tuple[Tensor, ...]:
                a, b, *limit = endpoint_sums(reference, sample)
                return (a.mul_(0.5), b.mul_(0.5), *limit) if halves_sums else (a, b, *limit)

            a, b, *limit = cached_between(operation, reference[0], sample[0], scaled_sums)
            if limit:
                return matmul_grads_termwise(reference, sample, grad, *limit)
            return function(a, b, grad if halves_sums else grad * 0.5)

        rule(*targets, linear_in=((0,), (1,)), name="product")(multiply)
        return multiply

    return declare


@rule(aten.mul, linear_in=((0,), (1,)), name="product")
def mul(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """y = a * b with broadcasting: m_a = (b_r + b_x) / 2 and m_b = (a_r + a_x) / 2.

    Where a product of mixed endpoints would be huge, :func:`sequential_factors` takes over.
    """
    if grad.is_complex():  # a real factor of a complex product has a real gradient
        return midpoint(operation, reference, sample, grad)
    (a_r, b_r), (a_x, b_x) = reference, sample
    half = grad * 0.5
    a, b = cached_between(operation, a_r, a_x, lambda: (a_r + a_x, b_r + b_x))
    cancels = mixed_product_may_exceed(a_r, b_r, a_x, b_x) | mixed_product_may_exceed(
        a_x, b_x, a_r, b_r
    )
    if any_or_tracing(cancels, rare=True):
        a, b = sequential_factors((a_r, b_r), (a_x, b_x), (a, b))
        return scale(half, b).sum_to_size(a_r.shape), scale(half, a).sum_to_size(b_r.shape)
    return (half * b).sum_to_size(a_r.shape), (half * a).sum_to_size(b_r.shape)


@matrix_product(aten.bmm)
def bmm(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """y = a @ b for batches of matrices: grad_a = g @ b^T and grad_b = a^T @ g."""
    return torch.bmm(grad, b.mT), torch.bmm(a.mT, grad)


@matrix_product(aten.matmul, aten.linalg_matmul, aten.mm)
def matmul(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """y = a @ b: grad_a = g @ b^T and grad_b = a^T @ g, summed over broadcast dimensions.

    Vectors are matrices of one row or one column.
    """
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
bilinear(aten.stft, factors=(0, 4))  # the signal and the window


@rule(aten.lerp, linear_in=((0, 1), (2,)))
def lerp(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """y = a + w (b - a), bilinear in w and (a, b): the derivative at the midpoint."""
    return midpoint(operation, reference, sample, grad)


#: The largest ratio of a divisor's sizes at its two endpoints up to which the formula for an
#: independent divisor is used.
MAX_DIVISOR_RATIO = 100.0


@rule(aten.div, aten.divide, aten.true_divide, linear_in=((0,),))
def div(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """y = a / b: the product of a and 1/b, where the secant of 1/b is -1 / (b_x b_r).

    With a bar for the mean of both endpoints:

        m_a = mean(1/b)    m_b = -a_bar / (b_x b_r)

    Where b is more than :data:`MAX_DIVISOR_RATIO` times larger at one endpoint than at the other,
    a = y b is taken as the product instead, as in :mod:`.normalization`, so that
    da = y_bar db + b_bar dy:

        m_a = 1 / b_bar    m_b = -y_bar / b_bar

    Such a b is the length of a vector that a belongs to, and nearly vanishes together with a. The
    network never computes a_x / b_r then.
    """
    if grad.is_complex():
        return complex_div(operation, reference, sample, grad)
    b_r, b_x = reference[-1], sample[-1]
    minus_secant = b_r.reciprocal() * b_x.reciprocal()  # of 1/b
    if operation.slots[0] != 0:
        return (scale(grad, -operation["self"] * minus_secant).sum_to_size(b_r.shape),)
    a_r, a_x = reference[0], sample[0]
    m_a, m_b = (b_r.reciprocal() + b_x.reciprocal()) / 2, -(a_r + a_x) / 2 * minus_secant
    smaller, larger = torch.minimum(b_r.abs(), b_x.abs()), torch.maximum(b_r.abs(), b_x.abs())
    is_length = (larger > MAX_DIVISOR_RATIO * smaller) & (b_r.sign() == b_x.sign())
    if any_or_tracing(is_length, rare=True):
        b_bar = b_r / 2 + b_x / 2
        minus_y_bar = -(a_r / b_r / 2 + a_x / b_x / 2)
        m_a = torch.where(is_length, b_bar.reciprocal(), m_a)
        m_b = torch.where(is_length, minus_y_bar / b_bar, m_b)
    return scale(grad, m_a).sum_to_size(a_r.shape), scale(grad, m_b).sum_to_size(b_r.shape)


def complex_div(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The formulas of :func:`div` for complex numbers; a and b may each be real.

    A real b is the length of a, as in z / |z|, whenever its sign stays the same.
    A gradient in PyTorch has the conjugate of the multiplier as a factor, and a real argument takes
    the real part.
    """
    b_r, b_x = reference[-1], sample[-1]
    v_r, v_x = b_r.reciprocal(), b_x.reciprocal()
    if operation.slots[0] != 0:
        return (conjugate_product(grad, -operation["self"] * v_r * v_x, b_r),)
    a_r, a_x = reference[0], sample[0]
    m_a, m_b = (v_r + v_x) / 2, -(a_r + a_x) / 2 * v_r * v_x
    is_length = (b_r * b_x.conj()).real > 0
    if b_r.is_complex():
        smaller, larger = torch.minimum(b_r.abs(), b_x.abs()), torch.maximum(b_r.abs(), b_x.abs())
        is_length &= larger > MAX_DIVISOR_RATIO * smaller
    if any_or_tracing(is_length, rare=True):
        b_bar = b_r / 2 + b_x / 2
        m_a = torch.where(is_length, b_bar.reciprocal(), m_a)
        m_b = torch.where(is_length, -(a_r * v_r + a_x * v_x) / 2 / b_bar, m_b)
    return conjugate_product(grad, m_a, a_r), conjugate_product(grad, m_b, b_r)


def conjugate_product(grad: Tensor, multiplier: Tensor, like: Tensor) -> Tensor:
    """Return the cotangent of an argument, of its shape and real if it is real."""
    product = scale(grad, multiplier.conj())
    return (product if like.is_complex() else product.real).sum_to_size(like.shape)
