"""The maker of rules for functions of one number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached_between, multiply_in_place
from fxshap.rules.core.dispatch import for_each_cotangent
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Target, Tensors, rule
from fxshap.rules.core.secants import multiply_unbounded, scale, smooth_secant
from fxshap.rules.core.tracing import any_unless_tracing

#: A formula of (r, x) and, by their names, of the operator's constant arguments.
SecantFn = Callable[..., Tensor]


def elementwise(
    *targets: Target,
    secant: SecantFn = smooth_secant,
    bounded: bool = False,
    holomorphic: SecantFn | None = None,
) -> None:
    """Declare operators that apply a function f to every element of their first argument.

    Parameters
    ----------
    *targets : operator
        Operators that map every element by itself.
    secant : callable, optional
        The formula of the secant: ``secant(r, x)`` returns (f(x) - f(r)) / (x - r) as a new
        tensor, for a reference and a sample whose shapes broadcast. Further parameters receive the
        operator's constant arguments of the same names; a parameter ``operation`` receives the
        :class:`Operation`, which computes f. The default serves any function that has a derivative
        (an operator of your own has one after ``torch.library.register_autograd``).
    bounded : bool
        Whether the secant is finite at every pair of finite points.
    holomorphic : callable, optional
        The formula of the secant of complex numbers, if f is a holomorphic function of them. It is
        the quotient in complex arithmetic. Without a formula, complex numbers get the generic rule.

    Raises
    ------
    RuleError
        If a target is not an operator.

    Examples
    --------
    The cube is smooth, and its secant has a closed form.

    >>> import torch, fxshap
    >>> @torch.library.custom_op("example::cube", mutates_args=())
    ... def cube(x: torch.Tensor) -> torch.Tensor:
    ...     return x**3
    >>> fxshap.rules.elementwise(cube, secant=lambda r, x: x * x + x * r + r * r)
    >>> fxshap.testing.check_rule(cube, [fxshap.testing.Varying((3,))])

    A scaled square takes its factor from the call.

    >>> @torch.library.custom_op("example::scaled_square", mutates_args=())
    ... def scaled_square(x: torch.Tensor, factor: float) -> torch.Tensor:
    ...     return factor * x**2
    >>> fxshap.rules.elementwise(scaled_square, secant=lambda r, x, factor: factor * (x + r))
    >>> fxshap.testing.check_rule(scaled_square, [fxshap.testing.Varying((3,)), 0.5])
    """

    def compute(formula: SecantFn, operation: Operation, r: Tensor, x: Tensor) -> Tensor:
        names = tuple(signature(formula).parameters)[2:]
        return formula(r, x, **{k: operation if k == "operation" else operation[k] for k in names})

    @rule(*targets, name=f"elementwise ({report_name(secant)})", grads_batched=True)
    def secant_rule(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        (r, *_), (x, *_) = reference, sample
        arguments = (*reference, *operation.arguments)
        batch = grad.shape[: grad.dim() - max(a.dim() for a in arguments if isinstance(a, Tensor))]
        is_complex = grad.is_complex() or r.is_complex()
        formula = holomorphic if is_complex else secant
        if operation.slots != (0,) or formula is None or r.is_complex() != is_complex:
            apply = partial(for_each_cotangent, generic) if batch else generic
            return apply(operation, reference, sample, grad)
        if is_complex:
            slope = cached_between(operation, r, x, lambda: compute(formula, operation, r, x))
            slope = slope.conj()
            slope = torch.where((r == x) & ~slope.isfinite(), 0.0, slope)  # sqrt has none at 0
            return (scale(grad, slope).sum_to_size(batch + r.shape),)
        multiplier = cached_between(operation, r, x, lambda: compute(secant, operation, r, x))
        if not bounded and any_unless_tracing(~multiplier.isfinite()):
            product = multiply_unbounded(operation, r, x, grad, multiplier)
        else:
            product = multiply_in_place(multiplier, grad)
        return (product.sum_to_size(batch + r.shape),)


def report_name(secant: SecantFn) -> str:
    """Return the name of the function f for reports: ``tanh_secant`` is the secant of ``tanh``."""
    return getattr(secant, "__name__", type(secant).__name__).removesuffix("_secant")
