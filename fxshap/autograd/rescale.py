"""The one autograd function: forward runs an operation, backward asks its rule.

`rescale` stands in the rewritten graph where a nonlinear operation stood. Its backward pass is a
multiplier over the finite difference between two ends, not a derivative at a point. Both ends are
read from an :class:`Ends` at backward time, so one recorded graph serves every pair of ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxshap.errors import RuleError
from fxshap.ops.dtypes import differentiable
from fxshap.rules.core.dispatch import (
    apply_rule,
    apply_rule_batched,
    check_differentiable,
    choose_rule,
)
from fxshap.rules.core.operation import Operation, Output
from fxshap.rules.smoothed_activations import activation, no_variance, variance


class Endpoints:
    """The two ends of a walk: what every nonlinear operation receives at each of them.

    Attributes
    ----------
    reference, sample : dict of str to Tensor
        The varying arguments of the rewritten operations, by the name of the graph node that made
        them. `rescale` fills `reference`; whoever walks fills `sample`, with as many rows or one.
    operations : dict of str to Operation
        The rewritten operations, with constants of as many rows as there are references.
    jumps : list of (Operation, tuple of str)
        Operations that depend on the input through integers or booleans alone, and their taps.
    copies : int
        How many copies of the references the graph is recorded on, each for a cotangent of its own.
    """

    def __init__(self) -> None:
        self.reference: dict[str, Tensor] = {}
        self.sample: dict[str, Tensor] = {}
        self.operations: dict[str, Operation] = {}
        self.jumps: list[tuple[Operation, tuple[str, ...]]] = []
        self.copies = 1

    def copied(self, copies: int) -> Endpoints:
        """Return ends to record `copies` copies of the same references on."""
        ends = Endpoints()
        ends.operations, ends.jumps, ends.copies = self.operations, self.jumps, copies
        return ends

    def refuse_jumps(self, reference: Mapping[str, Tensor], sample: Mapping[str, Tensor]) -> None:
        """Raise if integers or booleans that no multiplier can follow differ between two ends."""
        for operation, taps in self.jumps:
            if any(bool((sample[tap] != reference[tap]).any()) for tap in taps):
                raise RuleError(
                    f"{operation.target} ({operation.name}) depends on the input only through "
                    "integers or booleans, which have no derivative, and they differ between "
                    "sample and reference; compute them with comparisons and torch.where on "
                    "floating-point tensors instead"
                )


def rescale(
    ends: Endpoints,
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
        Batch dimension of each varying argument and of each output.
    target : operator
        The ATen operator.
    """
    operation, varying = Operation.bind(
        target, args, kwargs, slots=tuple(taps), name=name, rows=rows
    )
    apply: Callable[..., Output] = _Rescale.apply
    output = apply(ends, operation, tuple(taps.values()), *varying)
    return output


def rescale_variance(
    ends: Endpoints, name: str, taps: dict[int, str], rows: tuple[int, ...], x: Tensor
) -> Output:
    """Rescale :func:`fxshap.rules.smoothed_activations.variance`, which is no operator."""
    return rescale(ends, name, taps, rows, variance, x)


def rescale_activation(
    ends: Endpoints,
    name: str,
    taps: dict[int, str],
    rows: tuple[int, ...],
    z: Tensor,
    v: Tensor,
    target: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Output:
    """Rescale :func:`fxshap.rules.smoothed_activations.activation` of an operator."""
    output = rescale(ends, name, taps, rows, activation, z, v, target, *args, **kwargs)
    _, variance_tap = taps.values()
    ends.reference[variance_tap] = no_variance(v)  # zeros, for which no memory is needed
    return output


#: What rescales a function that is no operator.
RESCALES: dict[Callable[..., Any], Callable[..., Output]] = {
    variance: rescale_variance,
    activation: rescale_activation,
}


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ends: Endpoints, operation: Operation, taps: tuple[str, ...], *varying: Tensor
    ) -> Output:
        if ends.copies == 1:
            # Detached: with their history they would hold on to the graph that holds on to `ends`.
            ends.reference.update(zip(taps, (value.detach() for value in varying), strict=True))
            ends.operations[operation.name] = operation
            if not any(map(differentiable, varying)):
                ends.jumps.append((operation, taps))
            elif not choose_rule(operation, varying).closed:
                check_differentiable(operation, varying)
        ctx.ends, ctx.operation, ctx.taps = ends, ends.operations[operation.name], taps
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
        cotangent = grad[0] if len(grad) == 1 else grad
        if ctx.ends.copies > 1:
            found = apply_rule_batched(operation, reference, sample, cotangent, ctx.ends.copies)
        else:
            found = apply_rule(operation, reference, sample, cotangent)
        return (None, None, None, *found)
