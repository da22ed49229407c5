"""The contract of a rule, checked at points where rules go wrong.

A :class:`Case` is an operator with its constant arguments; the varying ones are drawn at random.
The contract holds for each row: the multipliers times the differences of the arguments sum to the
cotangent times the difference of the outputs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap._compat import add_note
from fxshap.errors import AdditivityError
from fxshap.ops.dtypes import differentiable, is_floating
from fxshap.ops.schemas import argument_names
from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import DECOMPOSITIONS, Rule, Tensors, find_rule

#: How many rows are drawn for every argument that varies.
ROWS = 32
#: In place of a batch dimension: every element is a row of its own.
EACH = -1
#: The largest error of the finite difference that a rule restores, relative to the outputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
inf = math.inf


@dataclass(frozen=True)
class Varying:
    """An argument that depends on the model's input: its shape without the batch, and a range.

    Attributes
    ----------
    shape : tuple of int
        For one row.
    low, high : float
        Where the operation is defined.
    row : int, optional
        The batch dimension; ``None`` means that the operation has none and all is one row.
    masked : bool
        Whether it is -inf in one column at both endpoints.
    indices : int
        If not 0, the argument holds integers below this number, or booleans if it is 2.
    is_complex : bool
        Whether it holds complex numbers, whose parts are drawn like real numbers.
    """

    shape: tuple[int, ...]
    low: float = -inf
    high: float = inf
    row: int | None = 0
    masked: bool = False
    indices: int = 0
    is_complex: bool = False

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return both endpoints: x - r of size 1e-12 to 1e2, of both signs, and sometimes 0.

        In one row all differences are 0. Some values of either endpoint are multiples of 1/2, where
        the kinks are. Some close pairs lie on either side of a multiple, most often of 0.
        """
        if self.is_complex:
            parts = replace(self, is_complex=False, shape=(*self.shape, 2))
            r, x = parts.draw(generator)
            return torch.view_as_complex(r), torch.view_as_complex(x)
        shape = list(self.shape)
        if self.row is not None:
            shape.insert(self.row, ROWS)
        uniform = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
        low, high = max(self.low, min(-7.0, self.high - 7)), min(self.high, max(7.0, self.low + 7))
        r = low + (high - low) * uniform[0]
        r = torch.where(uniform[0] * 100 % 10 < 2, halves(r), r).clamp(self.low, self.high)
        d = 10 ** (14 * uniform[1] - 12) * (2 * uniform[2] - 1).sign() * (uniform[1] < 0.95)
        kind = uniform[2] * 100 % 10
        across = (kind > 8) & (d.abs() < 0.5)
        kink = torch.where(uniform[0] * 1000 % 2 < 1, 0.0, halves(r))
        r = torch.where(across, kink - uniform[0] * d, r).clamp(self.low, self.high)
        x = r + d
        x = torch.where(kind < 1, halves(x), x).clamp(self.low, self.high)
        if self.row is not None:
            x.select(self.row, 0).copy_(r.select(self.row, 0))
        if self.indices:
            r, x = ((value.abs() * 1e3).long() % self.indices for value in (r, x))
            return (r.bool(), x.bool()) if self.indices == 2 else (r, x)
        if self.masked:
            for value in (r, x):
                value[..., 1] = -inf
        return r, x


def halves(value: Tensor) -> Tensor:
    """Round to the nearest multiple of 1/2."""
    return (value * 2).round() / 2


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast a floating-point or complex tensor; return anything else unchanged."""
    if isinstance(value, Tensor) and value.is_complex():
        return value.to(dtype.to_complex())
    return value.to(dtype) if is_floating(value) else value


@dataclass(frozen=True)
class Case:
    """An operator and its arguments, :class:`Varying` where they vary.

    The batch dimensions are as for :func:`fxshap.testing.check_rule`; `note` goes into the name.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    output_row: int | None = 0
    state_row: int = 0
    note: str = ""

    def __str__(self) -> str:
        name = str(self.target).replace("aten.", "").replace(".default", "")
        return f"{name} {self.note}".strip()

    @property
    def varying(self) -> list[Varying]:
        """The arguments that vary."""
        return [a for a in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(a, Varying)]

    @property
    def rows(self) -> list[int | None]:
        """The batch dimension of every varying argument and of the output."""
        if self.output_row is EACH:
            return [EACH] * (len(self.varying) + 1)
        return [*(a.row for a in self.varying), self.output_row]

    @property
    def batch_dims(self) -> list[int | None]:
        """The same for an :class:`Operation`: elements that are rows are in the first dimension."""
        return [None if row is None else max(row, 0) for row in self.rows]

    @property
    def positions(self) -> set[int]:
        """The positions, in the operator's schema, of the arguments in which something varies."""
        names = argument_names(self.target)
        given = [*enumerate(self.args), *((names.index(k), a) for k, a in self.kwargs.items())]
        return {
            position
            for position, argument in given
            if any(isinstance(leaf, Varying) for leaf in pytree.tree_leaves(argument))
        }

    @property
    def rule(self) -> Rule | None:
        """The operator's rule, if it has one."""
        return find_rule(self.target)

    @property
    def is_linear(self) -> bool:
        """Whether autograd's derivative is the multiplier."""
        return self.rule is not None and self.rule.is_linear(self.positions)

    @property
    def decomposition(self) -> Callable[..., Any] | None:
        """The function that takes the operator's place, if it has no rule of its own."""
        return DECOMPOSITIONS.get(self.target) if self.rule is None else None

    def draw(self, dtype: torch.dtype) -> tuple[Operation, list[Tensor], list[Tensor]]:
        """Bind the operation and draw its varying arguments at the reference and at the sample."""
        generator = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))
        flat, structure = pytree.tree_flatten((self.args, self.kwargs))
        slots = [i for i, a in enumerate(flat) if isinstance(a, Varying)]
        pairs = [flat[slot].draw(generator) for slot in slots]
        r, x = ([cast(pair[i], dtype) for pair in pairs] for i in (0, 1))
        for slot, value in zip(slots, r, strict=True):
            flat[slot] = value
        flat = [cast(a, dtype) for a in flat]
        args, kwargs = pytree.tree_unflatten(flat, structure)
        operation, _ = Operation.bind(self.target, args, kwargs, slots=slots, rows=self.batch_dims)
        return operation, r, x


def cotangents(outputs: Any) -> Any:
    """Draw cotangents of the outputs: 0 where an output is not finite, ``None`` for indices."""
    generator = torch.Generator().manual_seed(0)
    leaves = (outputs,) if isinstance(outputs, Tensor) else outputs
    grads = tuple(
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) * y.isfinite()
        if differentiable(y)
        else None
        for y in leaves
    )
    return grads[0] if isinstance(outputs, Tensor) else grads


def row_sums(value: Tensor, row: int | None) -> Tensor:
    """Sum the real part over all dimensions but the batch."""
    if value.is_complex():
        value = value.real
    if row is EACH:
        return value
    return value.sum() if row is None else value.movedim(row, 0).reshape(ROWS, -1).sum(1)


def additivity_errors(
    case: Case, operation: Operation, r: Tensors, x: Tensors
) -> tuple[Tensor, list[Tensor | None]]:
    """Return, row by row, the relative error of the sum, and the multipliers.

    The error is |sum_j m_j (x_j - r_j) - sum_k g_k (y_k(x) - y_k(r))| over the scale
    sum_k |g_k| max(|y_k(x)|, |y_k(r)|, 1). The operation and the rule run in the given dtype. The
    sums are taken in float64, so that they add no errors. A difference that is not finite (both
    endpoints are -inf) counts as 0, but its multiplier must be finite.
    """
    full = [b.expand_as(a).contiguous() for a, b in zip(r, x, strict=True)]  # cuDNN needs it
    before, after = operation(*r), operation(*full)
    grad = cotangents(before)
    if case.is_linear:
        multipliers = vjp(operation, r, grad)
    else:
        multipliers = apply_rule(operation, r, x, grad)
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        before, after, grad = (before,), (after,), (grad,)
    required, scale = required_changes(case, grad, before, after)
    restored: Tensor | float = 0.0
    for m, a, b, row in zip(multipliers, r, full, case.rows, strict=False):
        if m is None:
            continue
        if m.shape != a.shape or m.dtype != a.dtype:
            raise AdditivityError(
                f"{describe(case)} gives a multiplier of shape {tuple(m.shape)} and {m.dtype} for "
                f"an argument of shape {tuple(a.shape)} and {a.dtype}; they must be the same "
                "(after broadcasting, Tensor.sum_to_size)"
            )
        step = torch.where(a == b, 0.0, double(b) - double(a))
        restored = restored + row_sums(double(m).conj() * step, row)
    return (restored - required).abs() / scale, list(multipliers)


def required_changes(case: Case, grads: Any, before: Any, after: Any) -> tuple[Tensor, Tensor]:
    """Return, row by row, the change that multipliers must restore, and the scale of its error.

    `grads`, `before` and `after` have one entry for each output.
    """
    change: Tensor | float = 0.0
    scale: Tensor | float = 0.0
    for index, (g, y_r, y_x) in enumerate(zip(grads, before, after, strict=True)):
        if g is None or (index and torch.equal(y_r, y_x)):  # a constant may have no rows
            continue
        row = case.state_row if index else case.output_row
        g, y_r, y_x = (double(value) for value in (g, y_r, y_x))
        equal = y_r == y_x
        larger = torch.maximum(y_x.abs(), y_r.abs()).clamp(min=1)
        larger = torch.where(equal & larger.isinf(), 1.0, larger)
        change = change + row_sums(g.conj() * torch.where(equal, 0.0, y_x - y_r), row)
        scale = scale + row_sums(g.abs() * larger, row)
    assert isinstance(change, Tensor) and isinstance(scale, Tensor)
    return change, scale


def double(value: Tensor) -> Tensor:
    """Return a tensor in double precision, real or complex."""
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def check(case: Case, dtype: torch.dtype) -> None:
    """Raise unless the rule of a case restores the finite difference, in floats of one type.

    It is checked between different points, between equal points, and from many references to a
    single sample row.
    """
    operation, r, x = case.draw(dtype)
    if case.decomposition is not None:
        check_decomposition(case, operation, r)
        return
    samples = {"between two points": x, "between equal points": r}
    if None not in case.rows:
        rows = [max(row or 0, 0) for row in case.rows]
        one = [value.narrow(row, 3, 1) for value, row in zip(x, rows, strict=False)]
        samples["from many references to one sample row"] = one
    for where, sample in samples.items():
        try:
            errors, multipliers = additivity_errors(case, operation, r, sample)
        except Exception as error:
            add_note(error, f"{describe(case)} was checked {where}, in {dtype}")
            raise
        finite = all(m is None or bool(m.isfinite().all()) for m in multipliers)
        if not finite:
            raise AdditivityError(
                f"{describe(case)} gives multipliers that are not finite {where}, in {dtype}; "
                "where points are equal the multiplier is the derivative"
            )
        if not errors.max() <= TOLERANCE[dtype]:
            raise AdditivityError(
                f"{describe(case)} does not restore the finite difference {where}, in {dtype}: "
                f"it is off by {errors.max():.1e}, more than {TOLERANCE[dtype]:.0e} of the outputs"
                f"{worst_endpoints(case, errors, r, sample)}"
            )


def check_decomposition(case: Case, operation: Operation, point: Tensors) -> None:
    """Raise unless a decomposition returns what the operator does."""
    assert case.decomposition is not None
    dtype = next(value.dtype for value in point if value.is_floating_point())
    parts = replace(operation, target=case.decomposition)
    outputs, results = (pytree.tree_leaves(f(*point)) for f in (operation, parts))
    for expected, actual in zip(outputs, results, strict=True):
        limit = TOLERANCE[dtype]
        if expected.shape != actual.shape or not torch.allclose(
            expected, actual, rtol=limit, atol=limit, equal_nan=True
        ):
            raise AdditivityError(
                f"{describe(case)} does not return what the operator does, in {dtype}"
            )


def describe(case: Case) -> str:
    """Return how messages name the rule of a case, its decomposition or its derivative."""
    if case.decomposition is not None:
        return f"the decomposition '{case.decomposition.__name__}' of {case.target}"
    if case.is_linear:
        return f"the derivative of {case.target}, declared linear in what varies here,"
    return f"the rule '{case.rule.name if case.rule else 'generic'}' of {case.target}"


def worst_endpoints(case: Case, errors: Tensor, r: Tensors, x: Tensors) -> str:
    """Return the arguments of the row with the largest error at both endpoints, as text."""
    if case.output_row is None:
        return ""
    index = int(errors.nan_to_num(inf).argmax())
    full = [b.expand_as(a) for a, b in zip(r, x, strict=True)]
    if case.output_row is EACH:
        pairs = [(a.flatten()[index], b.flatten()[index]) for a, b in zip(r, full, strict=True)]
    else:
        pairs = [
            (a.select(row, index), b.select(row, index))
            for a, b, row in zip(r, full, case.rows, strict=False)
            if row is not None
        ]
    return "".join(f"\n  from {a.tolist()}\n    to {b.tolist()}" for a, b in pairs)
