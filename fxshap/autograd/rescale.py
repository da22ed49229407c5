"""The autograd function of the rescale rule: forward runs an operation, backward calls its rule.

In the rescaled graph, `rescale` replaces every nonlinear operation. Its backward pass multiplies by
a finite difference between two endpoints instead of a derivative at a point. Both endpoints are
read from an :class:`Endpoints` at backward time, so one recorded graph serves every pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from fxshap.rules.core.tracing import any_unless_tracing
from fxshap.rules.smoothed_activations import activation, no_variance, variance
from fxshap.rules.smoothed_logsumexp import of_logits
from fxshap.rules.smoothed_maxima import maximum


class Endpoints:
    """What every nonlinear operation receives at the reference and at the sample.

    Attributes
    ----------
    reference, sample : dict of str to Tensor
        The varying arguments of the rescaled operations, by the name of the graph node that
        computes them. `rescale` fills `reference`. The caller of a backward pass fills `sample`,
        with as many rows or one.
    operations : dict of str to Operation
        The rescaled operations, with constants of as many rows as there are references.
    jumps : list of (Operation, tuple of str)
        Operations that depend on the input only through integers or booleans, and their taps.
    copies : int
        How many copies of the references the graph is recorded on, one for each cotangent.
    """

    def __init__(self) -> None:
        self.reference: dict[str, Tensor] = {}
        self.sample: dict[str, Tensor] = {}
        self.operations: dict[str, Operation] = {}
        self.jumps: list[tuple[Operation, tuple[str, ...]]] = []
        self.copies = 1

    def for_copies(self, copies: int) -> Endpoints:
        """Return endpoints for a recording on `copies` copies of the same references."""
        endpoints = Endpoints()
        endpoints.operations, endpoints.jumps = self.operations, self.jumps
        endpoints.copies = copies
        return endpoints

    def check_jumps(self, reference: Mapping[str, Tensor], sample: Mapping[str, Tensor]) -> None:
        """Raise if integers or booleans without a multiplier differ between the endpoints."""
        for operation, taps in self.jumps:
            changes = [(sample[tap] != reference[tap]).any() for tap in taps]
            if any_unless_tracing(torch.stack(changes)):
                raise RuleError(
                    f"{operation.target} ({operation.name}) depends on the input only through "
                    "integers or booleans, which have no derivative, and they differ between "
                    "sample and reference; compute them with comparisons and torch.where on "
                    "floating-point tensors instead"
                )


def rescale(
    endpoints: Endpoints,
    name: str,
    taps: dict[int, str],
    rows: tuple[int | None, ...],
    target: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Output:
    """Run ``target(*args, **kwargs)``, with a multiplier instead of a derivative.

    Parameters
    ----------
    endpoints : Endpoints
        Where the values at both endpoints are stored.
    name : str
        Name of the rescaled node.
    taps : dict of int to str
        For each varying argument, its position among the flattened arguments and its tap.
    rows : tuple of int or None
        Batch dimension of each varying argument and of each output; ``None`` if it has none.
    target : operator
        The ATen operator.
    """
    operation, varying = Operation.bind(
        target, args, kwargs, slots=tuple(taps), name=name, rows=rows
    )
    apply: Callable[..., Output] = _Rescale.apply
    output = apply(endpoints, operation, tuple(taps.values()), *varying)
    return output


def rescale_variance(
    endpoints: Endpoints, name: str, taps: dict[int, str], rows: tuple[int | None, ...], x: Tensor
) -> Output:
    """Rescale :func:`fxshap.rules.smoothed_activations.variance`, which is no operator."""
    return rescale(endpoints, name, taps, rows, variance, x)


def rescale_smoothed(
    smoothed: Callable[..., Any],
    endpoints: Endpoints,
    name: str,
    taps: dict[int, str],
    rows: tuple[int | None, ...],
    z: Tensor,
    v: Tensor,
    shift: Tensor | None,
    target: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Output:
    """Rescale an operator that receives moments of a sum, by the function that has its rule."""
    output = rescale(endpoints, name, taps, rows, smoothed, z, v, shift, target, *args, **kwargs)
    _, *moments = taps.values()
    zeros = no_variance(v)  # they take no memory
    endpoints.reference.update(dict.fromkeys(moments, zeros))
    return output


def rescale_activation(*args: Any, **kwargs: Any) -> Output:
    """Rescale :func:`fxshap.rules.smoothed_activations.activation` of an operator."""
    return rescale_smoothed(activation, *args, **kwargs)


def rescale_maximum(*args: Any, **kwargs: Any) -> Output:
    """Rescale :func:`fxshap.rules.smoothed_maxima.maximum` of an operator."""
    return rescale_smoothed(maximum, *args, **kwargs)


def rescale_of_logits(*args: Any, **kwargs: Any) -> Output:
    """Rescale :func:`fxshap.rules.smoothed_logsumexp.of_logits` of an operator."""
    return rescale_smoothed(of_logits, *args, **kwargs)


#: What rescales operators that receive moments of a sum.
RESCALES_OF_SUMS = (rescale_activation, rescale_maximum, rescale_of_logits)
#: For functions that are no operators, what rescales them.
RESCALES: dict[Callable[..., Any], Callable[..., Output]] = {
    variance: rescale_variance,
    activation: rescale_activation,
    maximum: rescale_maximum,
    of_logits: rescale_of_logits,
}


def output_of_copies(operation: Operation, varying: Sequence[Tensor], copies: int) -> Output:
    """Run an operation on rows that are several equal copies: on one of them."""
    if copies == 1:
        return operation(*varying)
    dims = [row or 0 for row in operation.rows]  # in a graph every tensor has rows
    first = [x.narrow(d, 0, x.shape[d] // copies) for x, d in zip(varying, dims, strict=False)]
    output = operation(*first)
    if isinstance(output, Tensor):
        return torch.cat([output] * copies, dims[-1])
    outputs = zip(output, dims[len(varying) :], strict=True)
    return tuple(torch.cat([value] * copies, dim) for value, dim in outputs)


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        endpoints: Endpoints,
        operation: Operation,
        taps: tuple[str, ...],
        *varying: Tensor,
    ) -> Output:
        if endpoints.copies == 1:
            # Detached: with their history they would keep alive the graph, which refers to
            # `endpoints`.
            endpoints.reference.update(
                zip(taps, (value.detach() for value in varying), strict=True)
            )
            endpoints.operations[operation.name] = operation
            if not any(map(differentiable, varying)):
                endpoints.jumps.append((operation, taps))
            elif not choose_rule(operation, varying).closed_form:
                check_differentiable(operation, varying)
        ctx.endpoints, ctx.operation, ctx.taps = (
            endpoints,
            endpoints.operations[operation.name],
            taps,
        )
        ctx.set_materialize_grads(False)
        output = output_of_copies(ctx.operation, varying, endpoints.copies)
        ctx.single = isinstance(output, Tensor)
        outputs = (output,) if isinstance(output, Tensor) else output
        ctx.mark_non_differentiable(*[o for o in outputs if not differentiable(o)])
        return output

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Any, ...]:
        operation: Operation = ctx.operation
        reference = [ctx.endpoints.reference[tap] for tap in ctx.taps]
        if all(g is None for g in grad):
            return (None, None, None, *[None] * len(reference))
        sample = [ctx.endpoints.sample[tap] for tap in ctx.taps]
        cotangent = grad[0] if ctx.single else grad
        if ctx.endpoints.copies > 1:
            cotangents = apply_rule_batched(
                operation, reference, sample, cotangent, ctx.endpoints.copies
            )
        else:
            cotangents = apply_rule(operation, reference, sample, cotangent)
        return (None, None, None, *cotangents)
