"""The one autograd function: forward runs an operation, backward asks its rule.

`rescale` stands in the rewritten graph where a nonlinear operation stood. Its backward pass is a
multiplier over the finite difference between two ends, not a derivative at a point. Both ends are
read from an :class:`Ends` at backward time, so one recorded graph serves every pair of ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxshap.errors import FxshapError, RuleError
from fxshap.rules.generic import GENERIC
from fxshap.rules.operation import Operation, Output, differentiable
from fxshap.rules.table import Rule, Tensors, find_rule


class Ends:
    """The two ends of a walk: what every nonlinear operation receives at each of them.

    Attributes
    ----------
    reference, sample : dict of str to Tensor
        The varying arguments of the rewritten operations, by the name of the graph node that made
        them. `rescale` fills `reference`; whoever walks fills `sample`, with as many rows or one.
    """

    def __init__(self) -> None:
        self.reference: dict[str, Tensor] = {}
        self.sample: dict[str, Tensor] = {}


def rescale(
    ends: Ends,
    name: str,
    taps: dict[int, str],
    rows: tuple[int, ...],
    target: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Output:
    """Run ``target(*args, **kwargs)``, with a multiplier for a derivative.

    Parameters
    ----------
    ends : Ends
        Where the two ends are kept.
    name : str
        Name of the rewritten node.
    taps : dict of int to str
        For each varying argument, its place among the flattened arguments and its tap.
    rows : tuple of int
        Batch dimension of each varying argument and of the output.
    target : operator
        The ATen operator.
    """
    operation, varying = Operation.bind(
        target, args, kwargs, slots=tuple(taps), name=name, rows=rows
    )
    output: Output = _Rescale.apply(ends, operation, tuple(taps.values()), *varying)
    return output


def choose_rule(operation: Operation, values: Tensors) -> Rule:
    """Return the rule of an operation; booleans and indices that vary need the generic one."""
    rule = find_rule(operation.target)
    if rule is None or rule.multiply is None or not all(map(differentiable, values)):
        return GENERIC
    return rule


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ends: Ends, operation: Operation, taps: tuple[str, ...], *varying: Tensor
    ) -> Output:
        ends.reference.update(zip(taps, varying, strict=True))
        ctx.ends, ctx.operation, ctx.taps = ends, operation, taps
        ctx.set_materialize_grads(False)
        output = operation(*varying)
        outputs = (output,) if isinstance(output, Tensor) else output
        ctx.mark_non_differentiable(*[o for o in outputs if not differentiable(o)])
        return output

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Any, ...]:
        operation: Operation = ctx.operation
        reference = [ctx.ends.reference[tap] for tap in ctx.taps]
        if all(g is None for g in grad):
            return (None, None, None, *[None] * len(reference))
        sample = [ctx.ends.sample[tap] for tap in ctx.taps]
        rule = choose_rule(operation, reference)
        assert rule.multiply is not None
        try:
            grads = rule.multiply(
                operation, reference, sample, grad[0] if len(grad) == 1 else grad
            )
        except FxshapError:
            raise
        except Exception as error:
            raise RuleError(
                f"the rule '{rule.name}' failed on {operation.target} ({operation.name}): {error}"
            ) from error
        return (None, None, None, *grads)
