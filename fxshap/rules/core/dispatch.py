"""Which rule an operation has, and how it is called."""

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
from fxshap.rules.core.caching import accumulating_tap, caching_between
from fxshap.rules.core.generic import GENERIC
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Rule, RuleFn, Tensors, find_rule


def choose_rule(operation: Operation, values: Tensors) -> Rule:
    """Return the rule of an operation.

    Varying booleans and indices need the generic rule, and so do complex numbers if the formula
    holds for real ones only.
    """
    rule = find_rule(operation.target)
    if rule is None or rule.backward is None or not all(map(differentiable, values)):
        return GENERIC
    return GENERIC if rule.real_only and any(v.is_complex() for v in values) else rule


def apply_rule(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Return the cotangents of the arguments of an operation, computed in float32 at least.

    The rule of a user's own operator computes in the type of its arguments.
    """
    if not runs_in_every_dtype(operation.target):
        return call_rule(operation, reference, sample, grad)
    single = isinstance(grad, Tensor)
    grads = call_rule(
        operation.accumulating,
        tuple(map(accumulating_tap, reference)),
        tuple(map(accumulating_tap, sample)),
        accumulating(grad) if single else tuple(map(accumulating, grad)),
    )
    return tuple(
        g.to(r.dtype) if g is not None and r.dtype in ACCUMULATE_IN else g
        for g, r in zip(grads, reference, strict=True)
    )


def call_rule(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Return the cotangents that the rule of an operation computes; raise if it fails."""
    rule = choose_rule(operation, reference)
    assert rule.backward is not None
    try:
        grads = rule.backward(operation, reference, sample, grad)
    except (FxshapError, torch.OutOfMemoryError):  # the latter is for whoever chose the batch
        raise
    except Exception as error:
        raise rule_error(rule, operation, f": {error}") from error
    if not isinstance(grads, tuple | list) or len(grads) != len(reference):
        raise rule_error(
            rule,
            operation,
            f": it returned a {type(grads).__name__}, not a tuple of {len(reference)}, one "
            "cotangent for every argument that varies",
        )
    for index, (g, r) in enumerate(zip(grads, reference, strict=True)):
        if g is not None and not broadcasts_to(g.shape, r.shape):
            raise rule_error(
                rule,
                operation,
                f": it returned a cotangent of shape {tuple(g.shape)} for the varying argument "
                f"{index}, of shape {tuple(r.shape)}",
            )
    return tuple(grads)


def rule_error(rule: Rule, operation: Operation, problem: str) -> RuleError:
    """Return the error of a rule that failed, with its operation."""
    node = f" ({operation.name})" if operation.name else ""
    return RuleError(f"the rule '{rule.name}' failed on {operation.target}{node}{problem}")


def apply_rule_batched(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any, copies: int
) -> tuple[Tensor | None, ...]:
    """Return the cotangents of the arguments for several cotangents of the output.

    They are concatenated in the batch dimensions: `copies` times as many rows as `reference` has.
    """
    dims = [row or 0 for row in operation.rows]  # in a graph every tensor has rows
    rows, output_rows = dims[: len(reference)], dims[len(reference) :]
    single = isinstance(grad, Tensor)
    stacked = tuple(
        None if g is None else g.unflatten(row, (copies, -1)).movedim(row, 0)
        for g, row in zip([grad] if single else grad, output_rows, strict=True)
    )
    batched = choose_rule(operation, reference).grads_batched
    apply = apply_rule if batched else partial(for_each_cotangent, apply_rule)
    grads = apply(operation, reference, sample, stacked[0] if single else stacked)
    return tuple(
        None if g is None else g.movedim(0, row).flatten(row, row + 1)
        for g, row in zip(grads, rows, strict=True)
    )


def broadcasts_to(larger: torch.Size, shape: torch.Size) -> bool:
    """Return True if ``sum_to_size(shape)`` works for a tensor of the shape `larger`."""
    if larger == shape:
        return True
    pairs = zip(reversed(shape), reversed(larger), strict=False)
    return len(shape) <= len(larger) and all(size in (1, other) for size, other in pairs)


def check_differentiable(operation: Operation, values: Tensors) -> None:
    """Raise if an operation without a rule of its own has no derivative either."""
    cause: Exception | None = None
    try:
        if has_derivative(operation, values):
            return
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        cause = error
    raise RuleError(
        f"{operation.target} ({operation.name}) has no derivative and no rule; give it a "
        "derivative with torch.library.register_autograd, or a rule with fxshap.rules.rule or "
        "fxshap.rules.elementwise(operator, secant=...)"
    ) from cause


def has_derivative(operation: Operation, values: Tensors) -> bool:
    """Return True if a backward pass through an operation works; torch's warnings are errors."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings("error", "(?s).*autograd kernel was not registered")
        leaves = [value.detach().requires_grad_(differentiable(value)) for value in values]
        outputs = [o for o in pytree.tree_leaves(operation(*leaves)) if o.requires_grad]
        if outputs:
            inputs = [leaf for leaf in leaves if leaf.requires_grad]
            zeros = [torch.zeros_like(o) for o in outputs]
            torch.autograd.grad(outputs, inputs, zeros, allow_unused=True)
    return bool(outputs)


def for_each_cotangent(
    backward: RuleFn, operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Call a rule once for each of several stacked cotangents, and stack its results."""
    stacked: Tensors = [grad] if isinstance(grad, Tensor) else [g for g in grad if g is not None]
    with caching_between(sample):
        results = [
            backward(
                operation, reference, sample, pytree.tree_map_only(Tensor, itemgetter(k), grad)
            )
            for k in range(len(stacked[0]))
        ]
    return tuple(
        None if gs[0] is None else torch.stack([g.sum_to_size(r.shape) for g in gs])
        for gs, r in zip(zip(*results, strict=True), reference, strict=True)
    )
