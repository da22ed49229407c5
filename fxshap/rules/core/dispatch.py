"""Choosing the rule of an operation and calling it."""

from __future__ import annotations

import warnings
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.errors import FxshapError, RuleError
from fxshap.ops.dtypes import ACCUMULATE_IN, accumulating, differentiable, runs_in_every_dtype
from fxshap.rules.core.caching import accumulating_tap, caching_slopes
from fxshap.rules.core.generic import GENERIC
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Rule, RuleFn, Tensors, find_rule


def choose_rule(operation: Operation, values: Tensors) -> Rule:
    """Return the rule of an operation; booleans and indices that vary need the generic one."""
    rule = find_rule(operation.target)
    if rule is None or rule.multiply is None or not all(map(differentiable, values)):
        return GENERIC
    return rule


def apply_rule(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Return the cotangents of the arguments of an operation, computed in float32 at least.

    Operators of a user's own are asked in the type they are given.
    """
    if not runs_in_every_dtype(operation.target):
        return call_rule(operation, reference, sample, grad)
    single = isinstance(grad, Tensor)
    found = call_rule(
        operation.accumulating,
        tuple(map(accumulating_tap, reference)),
        tuple(map(accumulating_tap, sample)),
        accumulating(grad) if single else tuple(map(accumulating, grad)),
    )
    return tuple(
        g.to(r.dtype) if g is not None and r.dtype in ACCUMULATE_IN else g
        for g, r in zip(found, reference, strict=True)
    )


def call_rule(
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
        if g is not None and not broadcasts_to(g.shape, r.shape):
            raise RuleError(
                f"the rule '{rule.name}' failed {where}: it returned a cotangent of shape "
                f"{tuple(g.shape)} for the varying argument {place}, of shape {tuple(r.shape)}"
            )
    return tuple(grads)


def apply_rule_batched(
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
    ask = apply_rule if stacked else partial(for_each_cotangent, apply_rule)
    found = ask(operation, reference, sample, stacks[0] if single else stacks)
    return tuple(
        None if g is None else g.movedim(0, row).flatten(row, row + 1)
        for g, row in zip(found, rows, strict=True)
    )


def broadcasts_to(wider: torch.Size, shape: torch.Size) -> bool:
    """Say whether a tensor can be summed over broadcast dimensions to another shape."""
    if wider == shape:
        return True
    pairs = zip(reversed(shape), reversed(wider), strict=False)
    return len(shape) <= len(wider) and all(size in (1, other) for size, other in pairs)


def check_differentiable(operation: Operation, values: Tensors) -> None:
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


def for_each_cotangent(
    multiply: RuleFn, operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Ask for each of several stacked cotangents alone, and stack what is found."""
    stacks: Tensors = [grad] if isinstance(grad, Tensor) else [g for g in grad if g is not None]
    with caching_slopes(sample):
        found = [
            multiply(
                operation, reference, sample, pytree.tree_map_only(Tensor, itemgetter(k), grad)
            )
            for k in range(len(stacks[0]))
        ]
    return tuple(
        None if gs[0] is None else torch.stack([g.sum_to_size(r.shape) for g in gs])
        for gs, r in zip(zip(*found, strict=True), reference, strict=True)
    )
