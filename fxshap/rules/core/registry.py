"""The registry: which rule an operation has, and the makers that register rules.

A rule serves one operation ``y = op(a, b, ...)`` between a reference and a sample. Given both
endpoints and the cotangent of ``y`` it returns the cotangents of ``a, b, ...`` such that

    sum(grad_a * (a_x - a_r)) + sum(grad_b * (b_x - b_r)) + ... = <grad_y, y_x - y_r>

for every row. Any composition of such rules then adds up. An operation that is (jointly) linear
in the arguments that vary needs no rule: autograd already gives exact multipliers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from fxshap.errors import RuleError
from fxshap.rules.core.operation import Operation

Target = OpOverload | OpOverloadPacket | CustomOpDef
Tensors = Sequence[Tensor]


class RuleFn(Protocol):
    """The function of a rule."""

    def __call__(
        self, operation: Operation, reference: Tensors, sample: Tensors, grad: Any, /
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the arguments that vary.

        Parameters
        ----------
        operation : Operation
            Its constant arguments are ``operation["name"]``.
        reference, sample : sequence of Tensor
            The arguments that vary, at both endpoints: of as many rows each, or of a single row in
            `sample` that stands for all.
        grad : Tensor or tuple of (Tensor or None)
            The cotangent of the output, or those of several outputs.

        Returns
        -------
        tuple of (Tensor or None)
            One entry for every argument that varies, of the shape of that argument at the
            reference, and ``None`` for arguments without a derivative.
        """
        ...


@dataclass(frozen=True)
class Rule:
    """How a cotangent passes back through one operation.

    Attributes
    ----------
    name : str
        Name of the rule, for reports.
    backward : callable, optional
        ``backward(operation, reference, sample, grad) -> grads``, see
        :class:`~fxshap.rules.core.registry.RuleFn`. ``None`` for operations that are linear in
        everything.
    linear_in : tuple of frozenset of int
        Sets of argument positions in which the operation is jointly linear (affine).
    closed_form : bool
        Whether the multiplier is a closed form; ``False`` for the generic rule.
    grads_batched : bool
        Whether `backward` takes several cotangents at once, stacked in a dimension before all
        others, and returns as many of each argument. Any other rule is called for each cotangent.
    real_only : bool
        Whether `backward` takes real numbers only. Complex ones then get the generic rule.
    """

    name: str
    backward: RuleFn | None
    linear_in: tuple[frozenset[int], ...] = ()
    closed_form: bool = True
    grads_batched: bool = False
    real_only: bool = False

    def is_linear(self, positions: Iterable[int]) -> bool:
        """Return True if the operation is linear in the arguments at `positions`."""
        return self.backward is None or any(set(positions) <= group for group in self.linear_in)


#: The rules by operator, and by the functions of :mod:`fxshap.rules.smoothed_activations`.
RULES: dict[Callable[..., Any], Rule] = {}
#: The functions that take the place of operators, by overload.
DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {}


def operator_of(target: Target) -> OpOverload | OpOverloadPacket:
    """Return the operator that a graph will show; raise if `target` is not one."""
    if isinstance(target, CustomOpDef):
        overload: OpOverload = target._opoverload
        return overload
    if not isinstance(target, OpOverload | OpOverloadPacket):
        raise RuleError(
            f"a rule is for an operator, not for {target!r}; give torch.ops.namespace.name, or "
            "what torch.library.custom_op returns"
        )
    return target


def linear(*targets: Target) -> None:
    """Declare operations that are linear (affine) in all their tensor arguments together.

    Autograd's derivative is their multiplier. For those that are linear in some arguments only,
    see `linear_in` of :func:`rule`; for products of two, :func:`bilinear`.

    Parameters
    ----------
    *targets : operator
        Overloads (``torch.ops.aten.sum.dim_IntList``), packets (``torch.ops.aten.sum``), or what
        ``torch.library.custom_op`` returns.

    Raises
    ------
    RuleError
        If a target is not an operator.

    Examples
    --------
    >>> import torch, fxshap
    >>> fxshap.rules.linear(torch.ops.aten.flip)
    """
    for target in targets:
        RULES[operator_of(target)] = Rule("linear", None)


def rule(
    *targets: Target,
    linear_in: Iterable[Iterable[int]] = (),
    closed_form: bool = True,
    grads_batched: bool = False,
    real_only: bool = False,
    name: str = "",
) -> Callable[[RuleFn], RuleFn]:
    """Declare the decorated function as the rule of `targets`.

    The function is called as ``backward(operation, reference, sample, grad)``. `operation` is an
    :class:`Operation`, whose constant arguments are ``operation["name"]``. `reference` and `sample`
    are lists of the arguments that vary, of as many rows each, or of one row in `sample` that
    stands for all. `grad` is the cotangent of the output, or a tuple of cotangents and ``None``
    for an operation of several outputs. The function returns one tensor for every varying
    argument, of the shape of that argument at the reference, or ``None`` for those without a
    derivative.

    Parameters
    ----------
    *targets : operator
        Overloads (``torch.ops.aten.max.dim``), packets (``torch.ops.aten.max``), or what
        ``torch.library.custom_op`` returns.
    linear_in : iterable of iterable of int
        Sets of argument positions in which the operation is jointly linear. Where no other
        argument varies, autograd's derivative is taken in place of the rule.
    closed_form : bool
        Whether the rule is a closed form, for reports.
    grads_batched : bool
        Whether the function takes several cotangents at once: `grad`, or each of its entries, then
        has one more dimension, before all others, and so has what it returns.
    real_only : bool
        Whether the formula holds for real numbers only. Complex ones then get the generic rule.
    name : str
        Name for reports; by default that of the function.

    Raises
    ------
    RuleError
        If a target is not an operator.

    See Also
    --------
    fxshap.testing.check_rule : Checks a rule at points where rules go wrong.

    Examples
    --------
    The square has the divided difference x + r.

    >>> import torch, fxshap
    >>> @fxshap.rules.rule(torch.ops.aten.square)
    ... def square(operation, reference, sample, grad):
    ...     (r,), (x,) = reference, sample
    ...     return (grad * (x + r),)
    >>> fxshap.testing.check_rule(torch.ops.aten.square.default, [fxshap.testing.Varying((3,))])
    """
    groups = tuple(frozenset(group) for group in linear_in)

    def declare(backward: RuleFn) -> RuleFn:
        for target in targets:
            RULES[operator_of(target)] = Rule(
                name or getattr(backward, "__name__", "rule"),
                backward,
                groups,
                closed_form,
                grads_batched,
                real_only,
            )
        return backward

    return declare


def decomposition(*targets: Target) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the decorated function as a decomposition of `targets`.

    It is called with the operator's own arguments and returns what the operator returns. Before
    the rewrite its operations take the place of the operator, each with its own rule.

    Parameters
    ----------
    *targets : operator
        Overloads, packets (for all their overloads), or what ``torch.library.custom_op`` returns.

    Raises
    ------
    RuleError
        If a target is not an operator.

    Examples
    --------
    >>> import torch, fxshap
    >>> @fxshap.rules.decomposition(torch.ops.aten.logaddexp)
    ... def logaddexp(self, other):
    ...     return torch.logsumexp(torch.stack(torch.broadcast_tensors(self, other)), 0)
    """
    operators = [operator_of(target) for target in targets]
    overloads = [
        overload
        for operator in operators
        for overload in (
            [getattr(operator, name) for name in operator.overloads()]
            if isinstance(operator, OpOverloadPacket)
            else [operator]
        )
    ]

    def declare(decomposition: Callable[..., Any]) -> Callable[..., Any]:
        DECOMPOSITIONS.update(dict.fromkeys(overloads, decomposition))
        return decomposition

    return declare


def find_rule(target: Any) -> Rule | None:
    """Return the rule of an overload, else that of its packet, else ``None``."""
    if target in RULES:
        return RULES[target]
    packet = getattr(target, "overloadpacket", None)
    return RULES.get(packet) if packet is not None else None
