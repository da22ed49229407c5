"""Both ends of a single rule, from denormal numbers to 1e30, and what must hold for them.

Every rule owes, for each row, a finite multiplier and ``sum(m * (x - r)) = <g, y_x - y_r>`` to the
precision of the dtype. Excused are rows that no multiplier of the dtype can serve: whose operation
is not finite, or whose finite difference is larger than the dtype holds (1 / 5e-324 is infinite).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.ops.dtypes import differentiable
from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation, vjp
from fxshap.testing.rule_check import EACH, ROWS, TOLERANCE, Case, Varying
from tests.rules.rule_cases import GENERIC, INDICES, NORMS, RECURRENT

#: The smallest and the largest exponents of 10 of the values drawn: from denormal numbers up.
SMALLEST = {torch.float64: -323.0, torch.float32: -45.0}
LARGEST = 30.0
#: Of elements that change places, where a step of a unit in the last place makes a jump of 1, which
#: is steeper than any number if the step is smaller.
SMALLEST_JUMPING = {torch.float64: -290.0, torch.float32: -30.0}
#: What a rule cannot take up to 1e30 it is given up to these exponents.
LARGEST_OF = {
    "grid_sampler": 4.0,  # torch turns the places into integers
    "gru": 1.0,  # states h, whose products z (h - n) cancel when h is huge at one end
    "lstm": 1.0,
}
#: In float32, which 1e30 squared overflows: of norms and of what takes the generic rule.
LARGEST_SQUARED = 15.0
LARGEST_POWER = 8.0


@dataclass(frozen=True)
class Found:
    """What came of one batch of draws.

    Attributes
    ----------
    rows, excused : int
    worst : float
        The largest additivity error of the rows that are not excused.
    message : str
        The first failure, with its numbers; empty without one.
    """

    rows: int
    excused: int
    worst: float
    message: str


# --- drawing --------------------------------------------------------------------------------------


def exponents(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Return the smallest and the largest exponent of what a case is given."""
    high = next((high for name, high in LARGEST_OF.items() if str(case).startswith(name)), LARGEST)
    if dtype is torch.float32 and any(case is other for other in (*NORMS, *INDICES, *GENERIC)):
        high = min(high, LARGEST_POWER if "vector_norm" in str(case) else LARGEST_SQUARED)
    low = SMALLEST_JUMPING if str(case).startswith("fxshap.ranks") else SMALLEST
    return low[dtype], high


def draw_values(
    shape: tuple[int, ...],
    sizes: tuple[float, float],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    """Draw numbers of all sizes, zeros of both signs, kinks and ordinary ones."""
    low, high = sizes
    uniform, kind, sign = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
    sign = torch.where(sign < 0.5, -1.0, 1.0)
    ordinary = (uniform - 0.5) * 14
    value = sign * 10 ** (low + (high - low) * uniform)
    value = torch.where(kind < 0.6, sign * 10 ** (uniform * 12 - 8), value)
    value = torch.where(kind < 0.4, ordinary, value)
    value = torch.where(kind < 0.15, (ordinary * 2).round() / 2, value)
    value = torch.where(kind < 0.07, sign * 0.0, value)
    return value.to(dtype)


def draw_ends(
    varying: Varying,
    sizes: tuple[float, float],
    rows: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw reference and sample, in some places equal, a few units apart, or opposite."""
    shape = list(varying.shape)
    if varying.row is not None:
        shape.insert(varying.row, rows)
    r, x = (draw_values(tuple(shape), sizes, dtype, generator) for _ in range(2))
    kind, size = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    x = torch.where(kind < 0.5, (r.double() * (1 + 10 ** (size * 12 - 15))).to(dtype), x)
    x = torch.where(kind < 0.4, r * (1 + eps * (size * 8).round()).to(dtype), x)
    x = torch.where(kind < 0.3, -r, x)
    x = torch.where(kind < 0.25, r, x)
    r, x = (inside(end, varying) for end in (r, x))
    if varying.indices:
        r, x = ((end.abs() * 1e3).clamp(max=1e15).long() % varying.indices for end in (r, x))
        return (r.bool(), x.bool()) if varying.indices == 2 else (r, x)
    if varying.masked:
        for end in (r, x):
            end[..., 1] = -torch.inf
    return r, x


def inside(value: Tensor, varying: Varying) -> Tensor:
    """Bring values into the domain: most by reflection at its ends, the rest onto them."""
    low, high = varying.low, varying.high
    if low > -torch.inf and high == torch.inf:
        value = torch.where(value < low, 2 * low - value, value)
    elif high < torch.inf and low == -torch.inf:
        value = torch.where(value > high, 2 * high - value, value)
    return value.clamp(low, high)


def bind(case: Case, values: list[Tensor]) -> Operation:
    """Bind the operation of a case, with these values of its varying arguments."""
    flat, structure = pytree.tree_flatten((case.args, case.kwargs))
    slots = [place for place, argument in enumerate(flat) if isinstance(argument, Varying)]
    floating = [value.dtype for value in values if value.is_floating_point()]
    for place, argument in enumerate(flat):
        if isinstance(argument, Tensor) and argument.is_floating_point():
            flat[place] = argument.to(floating[0])
    for slot, value in zip(slots, values, strict=True):
        flat[slot] = value
    args, kwargs = pytree.tree_unflatten(flat, structure)
    operation, _ = Operation.bind(case.target, args, kwargs, slots=slots, rows=case.batch_dims)
    return operation


def rows_of(case: Case, wanted: int) -> int:
    """How many rows a case can take: constant states are there for its own number of them."""
    return ROWS if any(case is other for other in RECURRENT) else wanted


# --- checking -------------------------------------------------------------------------------------


def row_sums(value: Tensor, row: int | None) -> Tensor:
    """Sum over everything but the rows; what has no rows is one."""
    if row is EACH:
        return value
    if row is None:
        return value.sum().reshape(1)
    return value.movedim(row, 0).reshape(value.shape[row], -1).sum(1)


def row_largest(value: Tensor, row: int | None) -> Tensor:
    """Largest of every row."""
    if row is EACH:
        return value
    if row is None:
        return value.amax().reshape(1)
    return value.movedim(row, 0).reshape(value.shape[row], -1).amax(1)


def difference(x: Tensor, r: Tensor) -> Tensor:
    """x - r in float64, 0 where both are the same infinity."""
    return torch.where(x == r, 0.0, x.double() - r.double())


def outputs_of(operation: Operation, values: list[Tensor]) -> list[Tensor]:
    result = operation(*values)
    return [result] if isinstance(result, Tensor) else list(result)


def draw_cotangent(y: Tensor, generator: torch.Generator) -> Tensor | None:
    """Draw a cotangent, with zeros; ``None`` for indices."""
    if not differentiable(y) or not y.numel():
        return None
    normal, kind = torch.randn(2, *y.shape, generator=generator, dtype=torch.float64)
    # What is -inf behind a mask has no cotangent.
    return torch.where((kind > 1.5) | (y == -torch.inf), 0.0, normal).to(y.dtype)


@dataclass
class Rows:
    """Sums over each row."""

    owed: Tensor | float = 0.0
    given: Tensor | float = 0.0
    scale: Tensor | float = 0.0
    #: How far the ends are apart.
    distance: Tensor | float = 0.0
    #: What multipliers and outputs lose that are below the smallest normal number.
    floor: Tensor | float = 0.0
    finite: Tensor | bool = True


def check_draws(case: Case, dtype: torch.dtype, rows: int, seed: int) -> Found:
    """Draw both ends and a cotangent for many rows, and check them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = exponents(case, dtype)
    ends = [draw_ends(varying, sizes, rows, dtype, generator) for varying in case.varying]
    r, x = ([end[i] for end in ends] for i in (0, 1))
    operation = bind(case, r)
    before, after = outputs_of(operation, r), outputs_of(operation, x)
    grads = [draw_cotangent(y, generator) for y in before]
    grad: Any = tuple(grads) if isinstance(operation(*r), tuple) else grads[0]
    multipliers = apply_rule(operation, r, x, grad)

    sums = Rows()
    add_outputs(sums, case, grads, before, after)
    add_inputs(sums, case, multipliers, r, x)
    add_natural_size(sums, case, grads, r, x)
    excused = ~torch.as_tensor(sums.scale - sums.scale == 0)
    if case.output_row is EACH:
        excused |= unrepresentable(operation, r[0], x[0], grad, after[0] - before[0])
    else:
        add_conditioning(sums, case, operation, grads, r, before, generator)
        add_conditioning(sums, case, operation, grads, x, after, generator)
        add_sensitivity(sums, case, operation, grad, multipliers, r, x, generator)
        excused |= (sums.distance == 0) & integers_alone(case)
        # No multipliers reach it with steps as small as these.
        excused |= torch.as_tensor(sums.owed).abs() / sums.distance > torch.finfo(dtype).max / 10
    error = (sums.given - sums.owed).abs() / (TOLERANCE[dtype] * sums.scale + sums.floor)
    wrong = ~excused & (~sums.finite | ~(error <= 1))
    worst = torch.where(excused, 0.0, error * TOLERANCE[dtype]).nan_to_num(torch.inf).max()
    message = describe(wrong, case, r, x, grads, multipliers) if wrong.any() else ""
    return Found(wrong.numel(), int(excused.sum()), float(worst), message)


def add_outputs(
    sums: Rows, case: Case, grads: list[Tensor | None], before: list[Tensor], after: list[Tensor]
) -> None:
    """What is owed, and the size of the outputs."""
    for place, (g, y_r, y_x) in enumerate(zip(grads, before, after, strict=True)):
        if g is not None:
            row = case.state_row if place else case.output_row
            g, y_r, y_x = (value.double() for value in (g, y_r, y_x))
            sums.owed += row_sums(torch.where(g == 0, 0.0, g * difference(y_x, y_r)), row)
            size = g.abs() * torch.maximum(y_x.abs(), y_r.abs())
            sums.scale += row_sums(torch.where(g == 0, 0.0, size), row)
            sums.floor += 100 * torch.finfo(grads[0].dtype).tiny * row_sums(g.abs() + 1, row)


def add_inputs(sums: Rows, case: Case, multipliers: Any, r: list[Tensor], x: list[Tensor]) -> None:
    """What is given, the size of its parts, and whether all multipliers are finite."""
    for m, a, b, row in zip(multipliers, r, x, case.rows, strict=False):
        if m is not None:
            assert m.shape == a.shape and m.dtype == a.dtype
            d = difference(b, a)
            product = m.double() * d
            sums.given += row_sums(product, row)
            sums.distance += row_sums(d.abs(), row)
            sums.scale += row_sums(product.nan_to_num(0.0).abs(), row)
            sums.floor += 100 * torch.finfo(m.dtype).tiny * row_sums(d.abs(), row)
            sums.finite &= row_sums((~m.isfinite()).double(), row) == 0


def add_natural_size(
    sums: Rows, case: Case, grads: list[Tensor | None], r: list[Tensor], x: list[Tensor]
) -> None:
    """The size of the inputs, at most 1: torch's own erf, say, has no more digits than that."""
    sizes = [
        row_largest(torch.maximum(a.double().abs(), b.double().abs()), row)
        for a, b, row in zip(r, x, case.rows, strict=False)
        if differentiable(a)
    ]
    size = torch.stack(sizes).nan_to_num(0.0, 0.0).amax(0).clamp(max=1)
    for place, g in enumerate(grads):
        if g is not None:
            row = case.state_row if place else case.output_row
            sums.scale += size * row_sums(g.double().abs(), row)


def add_conditioning(
    sums: Rows,
    case: Case,
    operation: Operation,
    grads: list[Tensor | None],
    values: list[Tensor],
    outputs: list[Tensor],
    generator: torch.Generator,
) -> None:
    """How much outputs move with the last digits of the inputs, in units of those digits."""
    moved, size = disturbed(values, generator)
    for place, (g, y, z) in enumerate(
        zip(grads, outputs, outputs_of(operation, moved), strict=True)
    ):
        if g is not None:
            row = case.state_row if place else case.output_row
            change = difference(z, y).abs() / size
            sums.scale += row_sums(torch.where(g != 0, g.double().abs() * change, 0.0), row)


def add_sensitivity(
    sums: Rows,
    case: Case,
    operation: Operation,
    grad: Any,
    multipliers: Any,
    r: list[Tensor],
    x: list[Tensor],
    generator: torch.Generator,
) -> None:
    """How much what is given moves with the last digits of what the rule is told of the ends."""
    (near_r, size), (near_x, _) = (disturbed(end, generator) for end in (r, x))
    others = apply_rule(operation, near_r, near_x, grad)
    for m, other, a, b, row in zip(multipliers, others, r, x, case.rows, strict=False):
        if m is not None:
            change = (other.double() - m.double()) * difference(b, a)
            sums.scale += row_sums(change, row).abs().nan_to_num(0.0) / size


def disturbed(values: list[Tensor], generator: torch.Generator) -> tuple[list[Tensor], float]:
    """Change numbers by about the square root of the precision; also return that."""
    floating = [value.dtype for value in values if differentiable(value)]
    size = torch.finfo(floating[0]).eps ** 0.5
    moved = [
        v * (1 + size * torch.randn(v.shape, generator=generator)).to(v.dtype)
        if differentiable(v)
        else v
        for v in values
    ]
    return moved, size


def integers_alone(case: Case) -> bool:
    """Whether outputs may change while all numbers stay, with the indices."""
    return any(varying.indices for varying in case.varying)


def unrepresentable(
    operation: Operation, r: Tensor, x: Tensor, grad: Tensor, change: Tensor
) -> Tensor:
    """Where |g dy / dx|, or the derivative of equal ends, is more than a tenth of the largest."""
    largest = torch.finfo(r.dtype).max / 10
    slope = derivative(operation, r, grad)
    rise = grad.double().abs().clamp(min=1) * change.double().abs()
    secant = rise > largest * difference(x, r).abs()
    return torch.where(x == r, ~(slope.abs() <= largest), secant)


def derivative(operation: Operation, r: Tensor, grad: Tensor) -> Tensor:
    """g f'(r), 0 for steps that torch does not differentiate."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what has no derivative
            (slope,) = vjp(operation, (r,), grad)
    except RuntimeError:
        return torch.zeros_like(r)
    assert slope is not None
    return slope


def describe(
    wrong: Tensor, case: Case, r: list[Tensor], x: list[Tensor], grads: Any, multipliers: Any
) -> str:
    """Write down the first row that fails."""
    place = tuple(int(index) for index in wrong.nonzero()[0])

    def pick(value: Tensor | None, row: int | None) -> Any:
        if value is None or row is None:
            return value
        return (value[place] if row is EACH else value.select(row, place[0])).tolist()

    parts = [
        f"r={pick(a, row)} x={pick(b, row)} m={pick(m, row)}"
        for a, b, m, row in zip(r, x, multipliers, case.rows, strict=False)
    ]
    return f"{case}: {', '.join(parts)} g={[pick(g, case.output_row) for g in grads]}"
