"""Random endpoints of a single rule, from denormal numbers to 1e30, and a check of its multipliers.

For each row a rule must return finite multipliers with ``sum(m * (x - r)) = <g, y_x - y_r>`` to the
precision of the dtype. Rows are excused if no multiplier of the dtype can satisfy this: their
operation is not finite, or their finite difference overflows (1 / 5e-324 is infinite).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.ops.dtypes import differentiable
from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation, vjp
from fxshap.testing.rule_check import EACH, ROWS, TOLERANCE, Case, Varying, cast, double
from tests.rules.cases import ALL, GENERIC, INDICES, NORMS, RECURRENT

aten = torch.ops.aten

#: The cases that are drawn: all operations that a graph shows.
DRAWN = [case for case in ALL if case.decomposition is None]

#: The smallest and the largest exponents of 10 of the values drawn; the smallest are denormal.
SMALLEST = {torch.float64: -323.0, torch.float32: -45.0}
LARGEST = 30.0
#: The smallest exponents of elements whose ranks change, and of complex numbers whose sign is
#: taken: a difference of a unit in the last place makes a jump of 1, whose slope overflows for
#: smaller numbers, and torch's sign of denormal numbers has few digits.
SMALLEST_NORMAL = {torch.float64: -290.0, torch.float32: -30.0}
#: The largest exponents of operators that do not support 1e30.
LARGEST_OF = {
    aten.grid_sampler.default: 4.0,  # torch casts the coordinates to integers
    aten.grid_sampler_2d.default: 4.0,
    aten.grid_sampler_3d.default: 4.0,
    aten.gru.input: 1.0,  # the products z (h - n) cancel when h is huge at one endpoint
    aten.lstm.input: 1.0,
}
#: The largest exponent in float32, where the square of 1e30 overflows, of norms and of operations
#: under the generic rule.
LARGEST_SQUARED = 15.0
#: The same for vector norms, whose powers are higher.
LARGEST_POWER = 8.0


@dataclass(frozen=True)
class DrawResult:
    """The result of one batch of draws.

    Attributes
    ----------
    rows, excused : int
        The numbers of all rows and of excused rows.
    largest_error : float
        The largest additivity error of the rows that are not excused.
    failure : str
        The first failure with its numbers, or an empty string.
    """

    rows: int
    excused: int
    largest_error: float
    failure: str


# --- drawing --------------------------------------------------------------------------------------


def exponent_range(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Return the smallest and the largest exponent of the values drawn for a case."""
    high = LARGEST_OF.get(case.target, LARGEST)
    if dtype is torch.float32 and any(case is other for other in (*NORMS, *INDICES, *GENERIC)):
        is_vector_norm = case.target is aten.linalg_vector_norm.default
        high = min(high, LARGEST_POWER if is_vector_norm else LARGEST_SQUARED)
    jumps = case.target in (torch.ops.fxshap.ranks.default, aten.sgn.default)
    low = SMALLEST_NORMAL if jumps else SMALLEST
    return low[dtype], high


def draw_values(
    shape: tuple[int, ...],
    sizes: tuple[float, float],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    """Draw numbers of all sizes, zeros of both signs, likely kinks and ordinary numbers."""
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


def draw_endpoints(
    varying: Varying,
    sizes: tuple[float, float],
    rows: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw references and samples; some are equal, a few units apart, or opposite."""
    if varying.is_complex:
        parts = replace(varying, is_complex=False, shape=(*varying.shape, 2))
        r, x = draw_endpoints(parts, sizes, rows, dtype, generator)
        return torch.view_as_complex(r), torch.view_as_complex(x)
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
    r, x = (into_domain(end, varying) for end in (r, x))
    if varying.indices:
        r, x = ((end.abs() * 1e3).clamp(max=1e15).long() % varying.indices for end in (r, x))
        return (r.bool(), x.bool()) if varying.indices == 2 else (r, x)
    if varying.masked:
        for end in (r, x):
            end[..., 1] = -torch.inf
    return r, x


def into_domain(value: Tensor, varying: Varying) -> Tensor:
    """Move values into the domain by reflection at its bounds; clamp the remaining ones."""
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
    flat = [cast(argument, real_type(values)) for argument in flat]
    for slot, value in zip(slots, values, strict=True):
        flat[slot] = value
    args, kwargs = pytree.tree_unflatten(flat, structure)
    operation, _ = Operation.bind(case.target, args, kwargs, slots=slots, rows=case.batch_dims)
    return operation


def real_type(values: list[Tensor]) -> torch.dtype:
    """Return the dtype of the numbers among these tensors, or of their parts."""
    return next(v.dtype for v in values if differentiable(v)).to_real()


def max_rows(case: Case, wanted: int) -> int:
    """Return how many rows a case supports: constant recurrent states fix their number."""
    return ROWS if any(case is other for other in RECURRENT) else wanted


# --- checking -------------------------------------------------------------------------------------


def row_sums(value: Tensor, row: int | None) -> Tensor:
    """Return the sum of the real part of every row; all elements are one row without a batch."""
    value = value.real if value.is_complex() else value
    if row is EACH:
        return value
    if row is None:
        return value.sum().reshape(1)
    return value.movedim(row, 0).reshape(value.shape[row], -1).sum(1)


def row_largest(value: Tensor, row: int | None) -> Tensor:
    """Return the largest element of every row."""
    if row is EACH:
        return value
    if row is None:
        return value.amax().reshape(1)
    return value.movedim(row, 0).reshape(value.shape[row], -1).amax(1)


def difference(x: Tensor, r: Tensor) -> Tensor:
    """Return x - r in double precision, and 0 where both are the same infinity."""
    return torch.where(x == r, 0.0, double(x) - double(r))


def outputs_of(operation: Operation, values: list[Tensor]) -> list[Tensor]:
    result = operation(*values)
    return [result] if isinstance(result, Tensor) else list(result)


def draw_cotangent(y: Tensor, generator: torch.Generator) -> Tensor | None:
    """Draw a cotangent in which some elements are 0; return ``None`` for indices."""
    if not differentiable(y) or not y.numel():
        return None
    if y.is_complex():
        parts = draw_cotangent(torch.view_as_real(y), generator)
        return None if parts is None else torch.view_as_complex(parts)
    normal, kind = torch.randn(2, *y.shape, generator=generator, dtype=torch.float64)
    # Masked outputs of -inf have a cotangent of 0.
    return torch.where((kind > 1.5) | (y == -torch.inf), 0.0, normal).to(y.dtype)


@dataclass
class RowSums:
    """Sums over each row."""

    #: <g, y_x - y_r>, which the attributions must add up to.
    required: Tensor | float = 0.0
    attributed: Tensor | float = 0.0
    #: The size that errors are relative to.
    scale: Tensor | float = 0.0
    #: The sum of |x - r|.
    distance: Tensor | float = 0.0
    #: The absolute error of multipliers and outputs below the smallest normal number.
    floor: Tensor | float = 0.0
    finite: Tensor | bool = True


def check_draws(case: Case, dtype: torch.dtype, rows: int, seed: int) -> DrawResult:
    """Draw endpoints and a cotangent for many rows, and check the multipliers."""
    generator = torch.Generator().manual_seed(seed)
    sizes = exponent_range(case, dtype)
    ends = [draw_endpoints(varying, sizes, rows, dtype, generator) for varying in case.varying]
    r, x = ([end[i] for end in ends] for i in (0, 1))
    operation = bind(case, r)
    before, after = outputs_of(operation, r), outputs_of(operation, x)
    grads = [draw_cotangent(y, generator) for y in before]
    grad: Any = tuple(grads) if isinstance(operation(*r), tuple) else grads[0]
    apply = linear_rule if case.is_linear else apply_rule
    multipliers = apply(operation, r, x, grad)

    sums = RowSums()
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
        excused |= (sums.distance == 0) & has_indices(case)
        # No multiplier restores such a change over such a small difference.
        excused |= (
            torch.as_tensor(sums.required).abs() / sums.distance > torch.finfo(dtype).max / 10
        )
    error = (sums.attributed - sums.required).abs() / (TOLERANCE[dtype] * sums.scale + sums.floor)
    wrong = ~excused & (~sums.finite | ~(error <= 1))
    largest = torch.where(excused, 0.0, error * TOLERANCE[dtype]).nan_to_num(torch.inf).max()
    failure = describe_failure(wrong, case, r, x, grads, multipliers) if wrong.any() else ""
    return DrawResult(wrong.numel(), int(excused.sum()), float(largest), failure)


def linear_rule(operation: Operation, r: list[Tensor], x: list[Tensor], grad: Any) -> Any:
    """Return the derivative, as it is the multiplier of a linear operation."""
    return vjp(operation, r, grad)


def add_outputs(
    sums: RowSums, case: Case, grads: list[Tensor | None], before: list[Tensor], after: list[Tensor]
) -> None:
    """Add the required change, and the size of the outputs."""
    for place, (g, y_r, y_x) in enumerate(zip(grads, before, after, strict=True)):
        if g is not None:
            row = case.state_row if place else case.output_row
            g, y_r, y_x = map(double, (g, y_r, y_x))
            change = torch.where(g == 0, 0.0, g.conj() * difference(y_x, y_r))
            sums.required += row_sums(change, row)
            size = g.abs() * torch.maximum(y_x.abs(), y_r.abs())
            sums.scale += row_sums(torch.where(g == 0, 0.0, size), row)
            sums.floor += 100 * torch.finfo(grads[0].dtype).tiny * row_sums(g.abs() + 1, row)


def add_inputs(
    sums: RowSums, case: Case, multipliers: Any, r: list[Tensor], x: list[Tensor]
) -> None:
    """Add the attributions and their sizes, and whether all multipliers are finite."""
    for m, a, b, row in zip(multipliers, r, x, case.rows, strict=False):
        if m is not None:
            assert m.shape == a.shape and m.dtype == a.dtype
            d = difference(b, a)
            product = torch.where(d == 0, 0.0, double(m).conj() * d)
            sums.attributed += row_sums(product, row)
            sums.distance += row_sums(d.abs(), row)
            sums.scale += row_sums(product.abs().nan_to_num(0.0), row)
            sums.floor += 100 * torch.finfo(m.dtype).tiny * row_sums(d.abs(), row)
            sums.finite &= row_sums((~m.isfinite()).double(), row) == 0


def add_natural_size(
    sums: RowSums, case: Case, grads: list[Tensor | None], r: list[Tensor], x: list[Tensor]
) -> None:
    """Add the size of the inputs, at most 1: torch's erf, for example, is no more precise."""
    sizes = [
        row_largest(torch.maximum(double(a).abs(), double(b).abs()), row)
        for a, b, row in zip(r, x, case.rows, strict=False)
        if differentiable(a)
    ]
    size = torch.stack(sizes).nan_to_num(0.0, 0.0).amax(0).clamp(max=1)
    for place, g in enumerate(grads):
        if g is not None:
            row = case.state_row if place else case.output_row
            sums.scale += size * row_sums(double(g).abs(), row)


def add_conditioning(
    sums: RowSums,
    case: Case,
    operation: Operation,
    grads: list[Tensor | None],
    values: list[Tensor],
    outputs: list[Tensor],
    generator: torch.Generator,
) -> None:
    """Add the change of the outputs with the last digits of the inputs, relative to those."""
    moved, size = perturbed(values, generator)
    for place, (g, y, z) in enumerate(
        zip(grads, outputs, outputs_of(operation, moved), strict=True)
    ):
        if g is not None:
            row = case.state_row if place else case.output_row
            change = difference(z, y).abs() / size
            sums.scale += row_sums(torch.where(g != 0, double(g).abs() * change, 0.0), row)


def add_sensitivity(
    sums: RowSums,
    case: Case,
    operation: Operation,
    grad: Any,
    multipliers: Any,
    r: list[Tensor],
    x: list[Tensor],
    generator: torch.Generator,
) -> None:
    """Add the change of the attributions with the last digits of the endpoints of the rule."""
    (near_r, size), (near_x, _) = (perturbed(end, generator) for end in (r, x))
    apply = linear_rule if case.is_linear else apply_rule
    others = apply(operation, near_r, near_x, grad)
    for m, other, a, b, row in zip(multipliers, others, r, x, case.rows, strict=False):
        if m is not None:
            change = (double(other) - double(m)).conj() * difference(b, a)
            sums.scale += row_sums(change, row).abs().nan_to_num(0.0) / size


def perturbed(values: list[Tensor], generator: torch.Generator) -> tuple[list[Tensor], float]:
    """Return numbers with relative errors of the square root of the precision, and that root."""
    size = torch.finfo(real_type(values)).eps ** 0.5
    moved = [
        v * (1 + size * torch.randn(v.shape, generator=generator)).to(v.dtype)
        if differentiable(v)
        else v
        for v in values
    ]
    return moved, size


def has_indices(case: Case) -> bool:
    """Return True if indices vary: outputs may then change while all numbers stay the same."""
    return any(varying.indices for varying in case.varying)


def unrepresentable(
    operation: Operation, r: Tensor, x: Tensor, grad: Tensor, change: Tensor
) -> Tensor:
    """Return where |g dy / dx|, or |g f'| for equal endpoints, is above a tenth of the maximum.

    So it is where equal endpoints have different values.
    """
    largest = torch.finfo(r.dtype).max / 10
    slope = derivative(operation, r, grad)
    rise = double(grad).abs().clamp(min=1) * double(change).abs()
    secant = rise > largest * difference(x, r).abs()
    jump = change != 0  # between 0 and -0, at a branch cut
    return torch.where(x == r, jump | ~(slope.abs() <= largest), secant)


def derivative(operation: Operation, r: Tensor, grad: Tensor) -> Tensor:
    """Return g f'(r), and 0 for steps that torch does not differentiate."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations without a derivative
            (slope,) = vjp(operation, (r,), grad)
    except RuntimeError:
        return torch.zeros_like(r)
    assert slope is not None
    return slope


def describe_failure(
    wrong: Tensor, case: Case, r: list[Tensor], x: list[Tensor], grads: Any, multipliers: Any
) -> str:
    """Return the numbers of the first row that fails."""
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
