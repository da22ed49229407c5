"""The one autograd function: forward runs an operation, backward asks its rule.

`rescale` stands in the rewritten graph where a nonlinear operation stood. Its backward pass is a
multiplier over the finite difference between two ends, not a derivative at a point. Both ends are
read from an :class:`Ends` at backward time, so one recorded graph serves every pair of ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.errors import FxshapError, RuleError
from fxshap.rules.core.generic import GENERIC
from fxshap.rules.core.operation import (
    ACCUMULATE_IN,
    Operation,
    Output,
    accumulating,
    differentiable,
    has_other_types,
    wide,
)
from fxshap.rules.core.registry import Rule, Tensors, find_rule, one_by_one
from fxshap.rules.smoothed_activations import activation, no_variance, variance


class Ends:
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

    def copied(self, copies: int) -> Ends:
        """Return ends to record `copies` copies of the same references on."""
        ends = Ends()
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
    ends: Ends, name: str, taps: dict[int, str], rows: tuple[int, ...], x: Tensor
) -> Output:
    """Rescale :func:`fxshap.rules.smoothed_activations.variance`, which is no operator."""
    return rescale(ends, name, taps, rows, variance, x)


def rescale_activation(
    ends: Ends,
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


def choose_rule(operation: Operation, values: Tensors) -> Rule:
    """Return the rule of an operation; booleans and indices that vary need the generic one."""
    rule = find_rule(operation.target)
    if rule is None or rule.multiply is None or not all(map(differentiable, values)):
        return GENERIC
    return rule


def multiply(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Return the cotangents of the arguments of an operation, computed in float32 at least.

    Operators of a user's own are asked in the type they are given.
    """
    if not has_other_types(operation.target):
        return ask_rule(operation, reference, sample, grad)
    single = isinstance(grad, Tensor)
    found = ask_rule(
        operation.accumulating,
        tuple(map(wide, reference)),
        tuple(map(wide, sample)),
        accumulating(grad) if single else tuple(map(accumulating, grad)),
    )
    return tuple(
        g.to(r.dtype) if g is not None and r.dtype in ACCUMULATE_IN else g
        for g, r in zip(found, reference, strict=True)
    )


def ask_rule(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Ask the rule of an operation for the cotangents of its arguments; raise if it fails."""
    rule = choose_rule(operation, reference)
    assert rule.multiply is not None
    where = f"on {operation.target}" + (f" ({operation.name})" if operation.name else "")
    try:
        grads = rule.multiply(operation, reference, sample, grad)
    except FxshapError:
        raise
    except Exception as error:
        raise RuleError(f"the rule '{rule.name}' failed {where}: {error}") from error
    if not isinstance(grads, tuple | list) or len(grads) != len(reference):
        raise RuleError(
            f"the rule '{rule.name}' failed {where}: it returned a {type(grads).__name__}, not a "
            f"tuple of {len(reference)}, one cotangent for every argument that varies"
        )
    for place, (g, r) in enumerate(zip(grads, reference, strict=True)):
        if g is not None and not sums_to(g.shape, r.shape):
            raise RuleError(
                f"the rule '{rule.name}' failed {where}: it returned a cotangent of shape "
                f"{tuple(g.shape)} for the varying argument {place}, of shape {tuple(r.shape)}"
            )
    return tuple(grads)


def multiply_copies(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any, copies: int
) -> tuple[Tensor | None, ...]:
    """Ask the rule for several cotangents, which lie one after another in the batch dimensions."""
    dims = [row or 0 for row in operation.rows]  # in a graph, no tensor is without rows
    rows, output_rows = dims[: len(reference)], dims[len(reference) :]
    single = isinstance(grad, Tensor)
    stacks = tuple(
        None if g is None else g.unflatten(row, (copies, -1)).movedim(row, 0)
        for g, row in zip([grad] if single else grad, output_rows, strict=True)
    )
    stacked = choose_rule(operation, reference).stacked
    ask = multiply if stacked else partial(one_by_one, multiply)
    found = ask(operation, reference, sample, stacks[0] if single else stacks)
    return tuple(
        None if g is None else g.movedim(0, row).flatten(row, row + 1)
        for g, row in zip(found, rows, strict=True)
    )


def sums_to(wider: torch.Size, shape: torch.Size) -> bool:
    """Say whether a tensor can be summed over broadcast dimensions to another shape."""
    if wider == shape:
        return True
    pairs = zip(reversed(shape), reversed(wider), strict=False)
    return len(shape) <= len(wider) and all(size in (1, other) for size, other in pairs)


def require_derivative(operation: Operation, values: Tensors) -> None:
    """Raise if an operation without a rule of its own has no derivative either."""
    cause: Exception | None = None
    try:
        if has_derivative(operation, values):
            return
    except Exception as error:
        cause = error
    raise RuleError(
        f"{operation.target} ({operation.name}) has no derivative and no rule; give it one, "
        "with torch.library.register_autograd or with a maker of fxshap.rules"
    ) from cause


def has_derivative(operation: Operation, values: Tensors) -> bool:
    """Try to walk back through an operation, with what torch only warns of as an error."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings("error", "(?s).*autograd kernel was not registered")
        leaves = [value.detach().requires_grad_(differentiable(value)) for value in values]
        outputs = [o for o in pytree.tree_leaves(operation(*leaves)) if o.requires_grad]
        if outputs:
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            zeros = [torch.zeros_like(o) for o in outputs]
            torch.autograd.grad(outputs, wanted, zeros, allow_unused=True)
    return bool(outputs)


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ends: Ends, operation: Operation, taps: tuple[str, ...], *varying: Tensor
    ) -> Output:
        if ends.copies == 1:
            # Detached: with their history they would hold on to the graph that holds on to `ends`.
            ends.reference.update(zip(taps, (value.detach() for value in varying), strict=True))
            ends.operations[operation.name] = operation
            if not any(map(differentiable, varying)):
                ends.jumps.append((operation, taps))
            elif not choose_rule(operation, varying).closed:
                require_derivative(operation, varying)
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
            found = multiply_copies(operation, reference, sample, cotangent, ctx.ends.copies)
        else:
            found = multiply(operation, reference, sample, cotangent)
        return (None, None, None, *found)
