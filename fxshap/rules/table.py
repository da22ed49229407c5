"""The table: which rule rewrites which operation, and the makers that fill it.

A rule answers for one operation ``y = op(a, b, ...)`` walked from a reference to a sample.
Given both ends and the cotangent of ``y`` it returns the cotangents of ``a, b, ...`` such that

    sum(grad_a * (a_x - a_r)) + sum(grad_b * (b_x - b_r)) + ... = <grad_y, y_x - y_r>

for every row. Any composition of such rules then adds up. An operation that is (jointly) linear
in the arguments that vary needs no rule: autograd already gives exact multipliers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from fxshap.rules.operation import Operation

Target = OpOverload | OpOverloadPacket | Callable[..., Any]
Tensors = Sequence[Tensor]
Multiply = Callable[[Operation, Tensors, Tensors, Any], tuple[Tensor | None, ...]]
Slope = Callable[[Operation, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """How to multiply a cotangent through one operation.

    Attributes
    ----------
    name : str
        Name of the rule, for reports.
    multiply : callable, optional
        ``multiply(operation, reference, sample, grad) -> grads``, with one entry for every
        varying argument. ``None`` for operations that are linear in everything.
    linear_in : tuple of frozenset of int
        Sets of argument positions in which the operation is jointly linear (affine).
    closed : bool
        Whether the multiplier is a closed form; ``False`` for the generic rule.
    """

    name: str
    multiply: Multiply | None
    linear_in: tuple[frozenset[int], ...] = ()
    closed: bool = True

    def is_linear(self, positions: Iterable[int]) -> bool:
        """Say whether the operation is linear in the arguments at `positions`."""
        return self.multiply is None or any(set(positions) <= group for group in self.linear_in)


RULES: dict[Target, Rule] = {}
COMPOSITES: dict[OpOverload, Callable[..., Any]] = {}


def linear(*targets: Target) -> None:
    """Declare operations that are linear (affine) in all their tensor arguments together."""
    for target in targets:
        RULES[target] = Rule("linear", None)


def rule(
    *targets: Target, linear_in: Iterable[Iterable[int]] = (), closed: bool = True, name: str = ""
) -> Callable[[Multiply], Multiply]:
    """Declare the decorated function as the rule of `targets`.

    Parameters
    ----------
    *targets : operator
        ATen overloads (``torch.ops.aten.max.dim``) or packets (``torch.ops.aten.max``).
    linear_in : iterable of iterable of int
        Sets of argument positions in which the operation is jointly linear.
    closed : bool
        Whether the rule is a closed form.
    name : str
        Name for reports; the function's own by default.
    """
    groups = tuple(frozenset(group) for group in linear_in)

    def declare(multiply: Multiply) -> Multiply:
        for target in targets:
            RULES[target] = Rule(name or multiply.__name__, multiply, groups, closed)
        return multiply

    return declare


def composite(*targets: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a decomposition: the operation is replaced by simpler ones before rewriting."""

    def declare(decomposition: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            COMPOSITES[target] = decomposition
        return decomposition

    return declare


def find_rule(target: Any) -> Rule | None:
    """Return the rule of an overload, else that of its packet, else ``None``."""
    if target in RULES:
        return RULES[target]
    packet = getattr(target, "overloadpacket", None)
    return RULES.get(packet) if packet is not None else None
