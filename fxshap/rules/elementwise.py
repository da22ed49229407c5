"""The maker of rules for functions of one number."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fxshap.rules.core.caching import cached_between, multiply_in_place
from fxshap.rules.core.dispatch import for_each_cotangent
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import SecantFn, Target, Tensors, rule
from fxshap.rules.core.secants import smooth_secant, without_overflow
from fxshap.rules.core.tracing import any_unless_tracing


def elementwise(*targets: Target, slope: SecantFn | None = None, bounded: bool = False) -> None:
    """Declare univariate functions of their first argument.

    Parameters
    ----------
    *targets : operator
        Operators that map every element by itself.
    slope : callable, optional
        ``slope(operation, r, x)`` returns (f(x) - f(r)) / (x - r), a new tensor. The default,
        :func:`smooth`, serves any function that has a derivative (an operator of your own has one
        after ``torch.library.register_autograd``).
    bounded : bool
        Whether the slope is finite at every pair of finite points.

    Raises
    ------
    RuleError
        If a target is not an operator.

    Examples
    --------
    The cube is smooth, and has a divided difference in closed form.

    >>> import torch, fxshap
    >>> @torch.library.custom_op("example::cube", mutates_args=())
    ... def cube(x: torch.Tensor) -> torch.Tensor:
    ...     return x**3
    >>> fxshap.rules.elementwise(cube, slope=lambda operation, r, x: x * x + x * r + r * r)
    >>> fxshap.testing.check_rule(cube, [fxshap.testing.Varying((3,))])
    """
    used = slope or smooth_secant

    @rule(*targets, name=f"elementwise ({used.__name__})", stacked=True)
    def secant_rule(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        arguments = (*reference, *operation.arguments)
        stack = grad.shape[: grad.dim() - max(a.dim() for a in arguments if isinstance(a, Tensor))]
        if operation.slots != (0,) or reference[0].is_complex():
            ask = partial(for_each_cotangent, generic) if stack else generic
            return ask(operation, reference, sample, grad)
        (r,), (x,) = reference, sample
        multiplier = cached_between(operation, r, x, lambda: used(operation, r, x))
        if not bounded and any_unless_tracing(~multiplier.isfinite()):
            product = without_overflow(operation, r, x, grad, multiplier)
        else:
            product = multiply_in_place(multiplier, grad)
        return (product.sum_to_size(stack + r.shape),)
