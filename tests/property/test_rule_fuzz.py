"""Every rule from denormal numbers to 1e30, and what that has found.

``python -m tests.property rules`` draws 100,000 times a rule; here a few hundred rows each.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.testing.rule_check import TOLERANCE, Case
from fxshap.verification.shapley import shapley_values
from tests.helpers import assert_exact
from tests.property.extremes import check_draws, draw_values, rows_of
from tests.rules.rule_cases import ALL

aten = torch.ops.aten
FLOATS = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@FLOATS
@pytest.mark.parametrize("case", ALL, ids=str)
def test_rules_add_up_at_every_size(case: Case, dtype: torch.dtype) -> None:
    """Finite and additive in every row that is not excused; most rows are not."""
    rows, excused = 0, 0
    for seed in range(6 if case.output_row is None else 1):
        found = check_draws(case, dtype, rows_of(case, 200), seed)
        assert not found.message
        rows, excused = rows + found.rows, excused + found.excused
    assert excused < 0.9 * rows


# --- multipliers that are bounded -----------------------------------------------------------------

#: Least and largest slope.
SLOPES: dict[str, tuple[float, float]] = {
    "relu": (0, 1),
    "relu6": (0, 1),
    "hardtanh": (0, 1),
    "clamp": (0, 1),
    "hardsigmoid": (0, 0.1666666717),  # torch's own derivative is 1/6 in float32
    "hardswish": (-0.5, 1.5),
    "softshrink": (0, 1),
    "leaky_relu": (0.01, 1),
    "abs": (-1, 1),
    "sigmoid": (0, 0.25),
    "tanh": (0, 1),
    "softplus": (0, 1),
    "log_sigmoid": (0, 1),
    "elu": (0, 1),
    "selu": (0, 1.7580993408473766),
    "silu": (-0.1, 1.1),
    "mish": (-0.12, 1.09),
    "gelu": (-0.13, 1.13),
    "erf": (0, 2 / math.sqrt(math.pi)),
    "special_ndtr": (0, 1 / math.sqrt(2 * math.pi)),
    "sin": (-1, 1),
    "cos": (-1, 1),
    "atan": (0, 1),
    "asinh": (0, 1),
}


def both_ends(
    shape: tuple[int, ...], dtype: torch.dtype, high: float = 30
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    r, x = (draw_values(shape, (-40, 30), dtype, generator) for _ in range(2))
    near = torch.rand(shape, generator=generator) < 0.3
    return r, torch.where(near, r * 1.001, x)


def slack(dtype: torch.dtype) -> float:
    """What a quotient of differences loses where the ends differ by a thousandth."""
    return 16 * torch.finfo(dtype).eps / 1e-3


@FLOATS
@pytest.mark.parametrize("name", SLOPES)
def test_slopes_stay_within_those_of_the_function(name: str, dtype: torch.dtype) -> None:
    operation, low, high = operation_of(name), *SLOPES[name]
    r, x = both_ends((4000,), dtype)
    (m,) = apply_rule(operation, [r], [x], torch.ones_like(r))
    assert m.min() >= low - slack(dtype)
    assert m.max() <= high + slack(dtype)


def operation_of(name: str, shape: tuple[int, ...] = (1,), args: Any = None) -> Operation:
    """Bind an operator of one varying argument and constants."""
    constants = {"clamp": (-1.0, 0.5), "softshrink": (0.5,)}.get(name, ()) if args is None else args
    target, _, overload = name.partition(".")
    operator = getattr(getattr(aten, target), overload or "default")
    operation, _ = Operation.bind(operator, (torch.zeros(shape), *constants), slots=(0,))
    return operation


@FLOATS
@pytest.mark.parametrize(
    "name, args",
    [
        ("amax", ([-1],)), ("amin", ([-1],)), ("max.dim", (-1,)), ("maximum", None),
        ("max_pool1d", ([5],)), ("adaptive_max_pool1d", ([1],)), ("logsumexp", ([-1],)),
    ],
)  # fmt: skip
def test_shares_of_a_maximum_lie_between_0_and_1(name: str, args: Any, dtype: torch.dtype) -> None:
    r, x = both_ends((500, 1, 5), dtype)
    if name == "maximum":
        operation, _ = Operation.bind(aten.maximum.default, (r, x), slots=(0, 1))
        ends = [r, x], [x.flip(0), r.flip(1)]
    else:
        operation, ends = operation_of(name, args=args), ([r], [x])
    y = operation(*ends[0])
    ones = (torch.ones_like(y[0]), None) if isinstance(y, tuple) else torch.ones_like(y)
    for m in apply_rule(operation, *ends, ones):
        assert m.min() >= -slack(dtype)
        assert m.max() <= 1 + slack(dtype)


@FLOATS
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e10, 1e30])
def test_multipliers_of_softmax_are_bounded(scale: float, dtype: torch.dtype) -> None:
    """Moving one logit by d moves no output by more than d / 4: slopes of a logistic function.

    A multiplier is a mean of such slopes times the cotangents, here at most 1, and their sum.
    """
    generator = torch.Generator().manual_seed(0)
    r, x, g = torch.randn(3, 500, 6, generator=generator, dtype=torch.float64).to(dtype)
    (m,) = apply_rule(operation_of("softmax.int", args=(-1,)), [scale * r], [scale * x], g.sign())
    assert m.abs().max() <= 2


# --- what the draws have found --------------------------------------------------------------------


def secant(name: str, r: float, x: float, dtype: torch.dtype, *args: Any) -> tuple[float, float]:
    """The multiplier between two numbers, and the change of the output that it gives."""
    ends = [torch.tensor([value], dtype=dtype) for value in (r, x)]
    (m,) = apply_rule(operation_of(name, args=args), ends[:1], ends[1:], torch.ones(1, dtype=dtype))
    return m.item(), m.item() * (ends[1].double() - ends[0].double()).item()


@FLOATS
@pytest.mark.parametrize("far", [700.0, 7782.53125, 1e5, 2.7695840936682888e10, 1e30])
@pytest.mark.parametrize("name", ["gelu", "erf", "erfc", "special_ndtr"])
def test_far_tails_of_the_normal_distribution_are_finite(name, far, dtype):
    """What made good for the rounding of z^2 overflowed: 0 * inf."""
    for r, x in ((far, far), (-far, -far), (-far, far), (far, far * (1 + 1e-6)), (0.0, -far)):
        m, _ = secant(name, r, x, dtype)
        assert math.isfinite(m)
    assert secant("gelu", far, 2 * far, dtype)[0] == pytest.approx(1, rel=1e-6)


@FLOATS
@pytest.mark.parametrize("far", [90.0, 8390.605691451925, 1e6, 1e19, 1e30])
def test_far_tails_of_gelus_tanh_form_are_finite(far, dtype):
    for r, x, slope in (
        (0.0, far, 1),
        (far, far, 1),
        (-far, -far, 0),
        (-far, 0.0, 0),
        (-far, far, 0.5),
    ):
        ends = [torch.tensor([value], dtype=dtype) for value in (r, x)]
        operation, _ = Operation.bind(aten.gelu.default, (ends[0],), {"approximate": "tanh"})
        (m,) = apply_rule(operation, ends[:1], ends[1:], torch.ones(1, dtype=dtype))
        assert m.item() == pytest.approx(slope, abs=1e-6)


@FLOATS
@pytest.mark.parametrize("name", ["silu", "mish"])
@pytest.mark.parametrize("x", [-50.0, -907405033298.1686, -1.4678160959147837e26])
def test_silu_and_mish_owe_nothing_far_below_0(name, x, dtype):
    """mean(s) + mean(x) ds/dx cancelled, to rounding errors of the size of x."""
    _, change = secant(name, 0.0, x, dtype)
    assert abs(change) < 1e-6 if x < -50 else abs(change) < 1e-18


@FLOATS
@pytest.mark.parametrize(
    "r, x", [(1e4, 1.1e4), (-29668.155684547422, 29668.155684547422), (1e19, 0)]
)
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_waves_of_large_arguments_add_up(name, r, x, dtype):
    """The midpoint's rounding error, times d, is larger than that of the quotient."""
    ends = [torch.tensor([value], dtype=dtype) for value in (r, x)]
    owed = getattr(torch, name)(ends[1].double()) - getattr(torch, name)(ends[0].double())
    _, change = secant(name, r, x, dtype)
    assert change == pytest.approx(owed.item(), abs=TOLERANCE[dtype])


def along_rows(name: str, r: Tensor, x: Tensor, *args: Any) -> float:
    """Additivity error of an operation along the last dimension, for a random cotangent."""
    operation = operation_of(name, args=args)
    y_r, y_x = operation(r), operation(x)
    g = torch.randn(r.shape, generator=torch.Generator().manual_seed(0)).to(r.dtype)
    (m,) = apply_rule(operation, [r], [x], g)
    given, owed = (
        (m.double() * (x.double() - r.double())).sum(-1),
        (g * (y_x - y_r)).double().sum(-1),
    )
    return float((given - owed).abs().max() / g.abs().sum(-1).max())


@FLOATS
@pytest.mark.parametrize("far", [1e4, 1e8, 1e15, 1e25])
def test_softmax_adds_up_where_a_logit_moves_far(far, dtype):
    """m is 1 - 1/far, which a number near 1 cannot hold."""
    r = torch.tensor([[1.0, 0.5, -1.0], [0.0, far, 2 * far], [far, -far, 0.0]], dtype=dtype)
    x = torch.tensor([[1.0, 0.5, far], [-far, 1.0, 2.0], [far, -far, far]], dtype=dtype)
    assert along_rows("softmax.int", r, x, -1) <= TOLERANCE[dtype]


@FLOATS
@pytest.mark.parametrize("far", [1e3, 1e6, 1e12])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm"])
def test_norms_add_up_where_one_end_is_much_larger(name, far, dtype):
    """The two terms of c times 1/t cancelled, to rounding errors of the ratio of the ends."""
    generator = torch.Generator().manual_seed(1)
    r, x = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64).to(dtype)
    x[0] *= far
    x[1, 2] = far
    r[2] = 0
    x[2] *= far
    args = {"layer_norm": ([6], None, None, 1e-5), "rms_norm": ([6],), "group_norm": (1,)}[name]
    assert along_rows(name, r, x, *args) <= TOLERANCE[dtype]


NORMS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "layer": ("layer_norm", ([8],)),
    "rms": ("rms_norm", ([8], None, 1e-6)),
    "group": ("group_norm", (1,)),
}


@pytest.mark.parametrize("kind", ["random", "tenth", "hundredth", "zero", "constant", "large"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_near_shapley_values_from_every_reference(norm: str, kind: str) -> None:
    """A constant reference gave attributions of the size of 1 / sqrt(eps)."""
    name, args = NORMS[norm]
    operation = operation_of(name, args=args)
    generator = torch.Generator().manual_seed(0)
    distances = []
    for _ in range(9):
        x, r, g = torch.randn(3, 1, 8, generator=generator, dtype=torch.float64)
        factor = {"tenth": 0.1, "hundredth": 0.01, "zero": 0.0, "large": 30.0}.get(kind, 1.0)
        r = torch.ones_like(r) * 0.7 if kind == "constant" else r * factor
        (m,) = apply_rule(operation, [r], [x], g)

        def value(point: Tensor, g: Tensor = g) -> Tensor:
            return (g * operation(point)).sum(-1, keepdim=True)

        exact = shapley_values(value, x[0], r[0]).squeeze(1)
        distances.append(float(((m * (x - r))[0] - exact).abs().sum() / exact.abs().sum()))
    assert statistics.median(distances) < 0.5


UNIT_LENGTH: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda x: F.normalize(x, dim=1)[:, :1],
    "cosine": lambda x: F.cosine_similarity(x, x.new_ones(1, 4)).unsqueeze(1),
    "by hand": lambda x: x[:, :1] / (x.norm(dim=1, keepdim=True) + 1e-9),
}


@FLOATS
@pytest.mark.parametrize("near", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("name", UNIT_LENGTH)
def test_vectors_of_unit_length_are_explained_from_zeros(name, near, dtype):
    """A quotient as a product with 1/b gave attributions of 1e11, whose sum had no digits."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return UNIT_LENGTH[name](x)

    reference = torch.full((1, 4), near, dtype=dtype)
    sample = torch.tensor([[1.0, 2.0, -1.0, 0.5]], dtype=dtype)
    explainable = fxshap.make_explainable(Model())
    (phi,) = assert_exact(Model(), explainable, [reference], [sample], TOLERANCE[dtype])
    assert abs(phi).max() < 2


def generic_error(target: Any, r: list[Tensor], x: list[Tensor], *others: Any) -> float:
    operation, _ = Operation.bind(target, (*r, *others), slots=tuple(range(len(r))))
    y_r, y_x = operation(*r), operation(*x)
    assert isinstance(y_r, Tensor) and isinstance(y_x, Tensor)
    grads = generic(operation, r, x, torch.ones_like(y_r))
    pairs = zip(grads, r, x, strict=True)
    given = sum((m * (b - a)).flatten(1).sum(1) for m, a, b in pairs if m is not None)
    assert isinstance(given, Tensor)
    owed = (y_x - y_r).flatten(1).sum(1)
    return float(((given - owed).abs() / torch.maximum(y_x.abs(), y_r.abs()).amax(1)).max())


@FLOATS
@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e12, 1e25, 1e200])
def test_the_generic_rule_holds_for_steps_whose_square_is_no_number(size, dtype):
    """<d, d> under- or overflowed, and the correction was lost."""
    if not 0 < torch.tensor(size, dtype=dtype) < torch.inf:
        pytest.skip("no number of this dtype")
    r = torch.tensor([[1.0, -0.5, 3.0, 0.25], [2.0, 1.0, 0.0, -1.0]], dtype=dtype) * size
    x = torch.tensor([[0.5, 2.0, -1.0, 0.125], [1.0, 3.0, -2.0, 0.0]], dtype=dtype) * size
    error = generic_error(aten.logcumsumexp.default, [r], [x], 1)
    assert error <= 10 * TOLERANCE[dtype]


@FLOATS
def test_the_generic_rule_passes_a_singularity_on_its_way(dtype):
    """The angle has no derivative at the origin, half way between opposite points."""
    y = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
    x = torch.tensor([[0.5, 1.0, 3.0]], dtype=dtype)
    assert generic_error(aten.atan2.default, [y, x], [-y, -x]) <= TOLERANCE[dtype]


@FLOATS
def test_the_generic_rule_ignores_what_nobody_asks_about(dtype):
    """0 * inf made all multipliers of the row NaN."""
    r, x = torch.tensor([[1.0, 2.0]], dtype=dtype), torch.tensor([[0.0, 3.0]], dtype=dtype)
    exponent = torch.tensor([[-1.0, 2.0]], dtype=dtype)
    operation, _ = Operation.bind(aten.pow.Tensor_Tensor, (r, exponent), slots=(0,))
    (m,) = apply_rule(operation, [r], [x], torch.tensor([[0.0, 1.0]], dtype=dtype))
    assert (m * (x - r)).sum().item() == pytest.approx(5, rel=TOLERANCE[dtype])


@FLOATS
def test_the_generic_rule_keeps_small_changes_beside_huge_steps(dtype):
    """A gather whose index moves away from a number of 1e25."""
    r = torch.tensor([[-5.0, -0.2, 4.7]], dtype=dtype)
    x = torch.tensor([[-5.0, -8.6e25, 5.2]], dtype=dtype)
    ends = [r, torch.tensor([[0, 1]])], [x, torch.tensor([[0, 2]])]
    operation, _ = Operation.bind(aten.gather.default, (r, 1, ends[0][1]), slots=(0, 2))
    m, _ = apply_rule(operation, *ends, torch.tensor([[1.0, 1.4]], dtype=dtype))
    given = (m.double() * (x.double() - r.double())).sum().item()
    assert given == pytest.approx(1.4 * (5.2 + 0.2), rel=TOLERANCE[dtype])


# --- what random networks have found --------------------------------------------------------------


@pytest.mark.parametrize("far", [1e6, 1e12, 1e150])
def test_logits_that_move_far_together_owe_no_more_than_softmax_changes(far):
    """The closed form gave +-far / 4, whose sum had no digits: a token that equals the others."""
    r = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64) * far
    x = torch.tensor([[-2.0, -0.5, -0.5], [1.0, 1.0, 1.0]], dtype=torch.float64) * far
    g = torch.tensor([[4.0, 3.0, 3.0], [1.0, -1.0, 0.5]], dtype=torch.float64)
    operation = operation_of("softmax.int", args=(-1,))
    (m,) = apply_rule(operation, [r], [x], g)
    parts = m * (x - r)
    owed = (g * (operation(x) - operation(r))).sum(-1)
    torch.testing.assert_close(parts.sum(-1), owed, rtol=0, atol=1e-12)
    assert (parts.abs() <= g.amax(-1, keepdim=True) - g.amin(-1, keepdim=True) + 1e-12).all()


@pytest.mark.parametrize("offset", [1e12, 1e285])
@pytest.mark.parametrize("far", [1e17, 1e285])
def test_a_softmax_of_values_that_are_huge_together_owes_no_more_than_it_changes(far, offset):
    """Of values near 1e12 the attributions were 1e12, and those near 1e285 overflowed."""
    r = torch.tensor([[3.0, 1.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64) * far
    x = torch.tensor([[4.0, 6.0, 0.5], [-1.0, -1.5, -3.0]], dtype=torch.float64) * far
    values = torch.tensor([[0.0, 1e5, -2e12]] * 2, dtype=torch.float64) * (offset / 1e12) + offset
    operation = operation_of("softmax.int", args=(-1,))
    (m,) = apply_rule(operation, [r], [x], values)
    parts = m * (x - r)
    owed = ((values - values[:, :1]) * (operation(x) - operation(r))).sum(-1)
    error = (parts.sum(-1) - owed).abs()
    assert (error <= 1e-15 * values.abs().amax(-1)).all()
    assert (parts[0].abs() <= 1.5e5 * (offset / 1e12)).all()


def test_two_logits_that_move_far_have_their_shapley_values():
    r, x = torch.zeros(1, 2).double(), torch.full((1, 2), 1e8).double()
    operation = operation_of("softmax.int", args=(-1,))
    g = torch.tensor([[1.0, 0.0]]).double()
    (m,) = apply_rule(operation, [r], [x], g)
    exact = shapley_values(lambda a: (g * operation(a)).sum(-1, keepdim=True), x[0], r[0])
    torch.testing.assert_close((m * (x - r))[0], exact.squeeze(1), rtol=0, atol=1e-12)


def two_ends(*ends: tuple[float, float]) -> tuple[list[Tensor], list[Tensor]]:
    """Both ends of several numbers."""
    at = [[torch.tensor([end[k]], dtype=torch.float64) for end in ends] for k in (0, 1)]
    return at[0], at[1]


def changes(target: Any, r: list[Tensor], x: list[Tensor]) -> tuple[list[float], float]:
    """The share of every argument in the change of the output, and that change."""
    operation, _ = Operation.bind(target, r, slots=tuple(range(len(r))))
    found = apply_rule(operation, r, x, torch.ones_like(r[0]))
    shares = [(m * (b - a)).item() for m, a, b in zip(found, r, x, strict=True)]
    return shares, (operation(*x) - operation(*r)).item()


@pytest.mark.parametrize("size", [1e8, 1e30, 1e150])
@pytest.mark.parametrize("turned", [False, True])
def test_a_gate_that_shuts_on_what_is_huge_owes_nothing_for_it(turned, size):
    """x * (x > 0) and x * sigmoid(x) far below 0: half the size cancelled."""
    ends = two_ends((0.5, -size), (1.0, 0.0))
    shares, owed = changes(aten.mul.Tensor, *(end[::-1] if turned else end for end in ends))
    assert sum(shares) == pytest.approx(owed, rel=1e-15)
    assert max(map(abs, shares)) <= 1


def test_a_tiny_product_keeps_the_digits_of_its_change():
    """A step after 2000 * sigmoid(-100) made 1e40 of what cancelled."""
    shares, owed = changes(aten.mul.Tensor, *two_ends((2000.0, 0.0), (1e-43, 0.5)))
    assert sum(shares) == pytest.approx(owed, rel=1e-15)


def test_gates_of_ordinary_size_share_as_before():
    shares, _ = changes(aten.mul.Tensor, *two_ends((0.0, 100.0), (1.0, 0.0)))
    assert shares == [50, -50]
    assert changes(aten.mul.Tensor, *two_ends((1.0, 0.0), (0.0, 1.0)))[0] == [-0.5, 0.5]


@pytest.mark.parametrize("size", [1e8, 1e30, 1e150])
def test_a_branch_that_is_huge_where_it_is_not_chosen_stands_still(size):
    """where(x > 0, y, x) far below 0: half the size of x cancelled."""
    select = torch.ops.fxshap.select.default
    for ends in ((1.0, 0.0), (0.25, 0.75), (size, 2.0)), ((0.0, 1.0), (-size, 3.0), (0.5, size)):
        shares, owed = changes(select, *two_ends(*ends))
        assert sum(shares) == pytest.approx(owed, rel=1e-15)
        assert max(map(abs, shares)) <= max(abs(owed), 3)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_gates_beside_huge_states_add_up(kind):
    """f c and z (h - n) cancelled where a gate shuts on a state of 1e30."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cell = getattr(nn, kind.upper())(3, 4).double()
    generator = torch.Generator().manual_seed(1)

    def end(size: float) -> list[Tensor]:
        shapes = [(2, 5, 3), (1, 5, 4), (1, 5, 4)][: 3 if kind == "lstm" else 2]
        drawn = [torch.randn(shape, generator=generator).double() * size for shape in shapes]
        return [drawn[0] / size * 30, *drawn[1:]]

    r, x = end(1e30), end(1.0)
    weights, options = [w.detach() for w in cell.parameters()], (True, 1, 0.0, False, False, False)
    hidden = (r[1:],) if kind == "lstm" else (r[1],)
    arguments = (r[0], *hidden, weights, *options)
    operation, _ = Operation.bind(
        getattr(aten, kind).input, arguments, slots=tuple(range(len(r))), rows=(1,) * (len(r) + 1)
    )
    before, after = operation(*r), operation(*x)
    grad = tuple(torch.ones_like(y) if k < 1 else None for k, y in enumerate(before))
    found = apply_rule(operation, r, x, grad)
    given = sum((m * (b - a)).sum() for m, a, b in zip(found, r, x, strict=True))
    owed = (after[0] - before[0]).sum()
    assert given.item() == pytest.approx(owed.item(), rel=1e-9)


@FLOATS
def test_a_sign_that_is_copied_owes_its_jump_to_what_it_is_copied_from(dtype):
    """A step that both arguments shared made 1e12 of the rounding error of the other."""
    a, b = torch.tensor([0.25], dtype=dtype), torch.tensor([0.0], dtype=dtype)
    ends = [a, b], [a + 0.125, b - 1e-15]
    shares, owed = changes(aten.copysign.Tensor, *ends)
    assert sum(shares) == pytest.approx(owed, rel=4 * torch.finfo(dtype).eps)
    assert shares[0] == 0 and shares[1] == pytest.approx(-0.625)


def test_a_step_of_denormal_length_has_a_multiplier_where_little_is_asked():
    """1 / 1e-310 is infinite, 1e-10 / 1e-310 is not."""
    r, x = two_ends((0.0, 1e-310))
    operation, _ = Operation.bind(torch.ops.fxshap.step.default, (r[0], "gt"))
    (m,) = apply_rule(operation, r, x, torch.full((1,), 1e-10, dtype=torch.float64))
    assert (m * (x[0] - r[0])).item() == pytest.approx(1e-10)


@pytest.mark.parametrize("turned", [False, True])
def test_quotients_and_powers_pass_nothing_that_is_huge(turned):
    """1e10 / 1.5 on the way from 1e10 / 1e10 to 0.5 / 1.5: its half cancelled."""
    cases = (
        (aten.div.Tensor_mode, ((-1e10, 4.0), (1e10, 1.5)), {"rounding_mode": "floor"}),
        (aten.pow.Tensor_Tensor, ((1e30, 2.0), (0.1, 3.0)), {}),
    )
    for target, ends, options in cases:
        r, x = two_ends(*(end[::-1] if turned else end for end in ends))
        operation, _ = Operation.bind(target, r, options, slots=(0, 1))
        found = apply_rule(operation, r, x, torch.ones_like(r[0]))
        shares = [(m * (b - a)).item() for m, a, b in zip(found, r, x, strict=True)]
        y_r, y_x = operation(*r).item(), operation(*x).item()
        assert sum(shares) == pytest.approx(y_x - y_r, rel=1e-12)
        assert max(map(abs, shares)) <= 2 * max(abs(y_r), abs(y_x)) + 1


def test_a_point_between_two_ends_that_samples_something_huge_owes_nothing_for_it():
    """The pixel at the row of the one end and the column of the other."""
    image = torch.tensor([[[[1.0, 1e30], [1e30, 2.0]]]], dtype=torch.float64)
    r, x = (torch.full((1, 1, 1, 2), at, dtype=torch.float64) for at in (-1.0, 1.0))
    operation, _ = Operation.bind(aten.grid_sampler_2d.default, (image, r, 0, 0, True), slots=(1,))
    (m,) = apply_rule(operation, [r], [x], torch.ones(1, 1, 1, 1, dtype=torch.float64))
    assert (m * (x - r)).flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "shapes", [((2, 3), (3, 4)), ((3,), (3, 4)), ((2, 3), (3,)), ((3,), (3,)), ((5, 2, 3), (3, 4))]
)
def test_a_weight_of_attention_that_vanishes_where_its_value_is_huge(shapes, turned):
    """Half of 1e30 cancelled in the matrix product."""
    generator = torch.Generator().manual_seed(0)
    r, x = (
        [torch.rand(2, *shape, generator=generator).double()[0] for shape in shapes]
        for _ in range(2)
    )
    r[0][..., 0], x[0][..., 0] = 0.5, 0.0
    x[1][:1] *= 1e30
    r, x = (x, r) if turned else (r, x)
    operation, _ = Operation.bind(aten.matmul.default, r, slots=(0, 1))
    y_r, y_x = operation(*r), operation(*x)
    found = apply_rule(operation, r, x, torch.ones_like(y_r))
    parts = [(m * (b - a)) for m, a, b in zip(found, r, x, strict=True)]
    assert sum(p.sum() for p in parts).item() == pytest.approx((y_x - y_r).sum().item(), rel=1e-12)
    assert max(p.abs().max() for p in parts) < 10


@pytest.mark.parametrize("turned", [False, True])
def test_an_image_that_is_huge_where_neither_end_is_sampled_moves_in_one_order(turned):
    """The image of the one end at the point of the other."""
    image = torch.tensor([[[[1.0, 1e30], [3.0, 1e30]], [[2.0, 5.0], [4.0, 6.0]]]]).double()
    other = torch.tensor([[[[9.0, 2.0], [2.0, 3.0]], [[7.0, 8.0], [8.0, 7.0]]]]).double()
    points = [torch.tensor([[[at]]], dtype=torch.float64) for at in ([-1.0, -1.0], [1.0, 0.5])]
    r, x = [image, points[0]], [other, points[1]]
    r, x = (x, r) if turned else (r, x)
    operation, _ = Operation.bind(aten.grid_sampler_2d.default, (*r, 0, 0, True), slots=(0, 1))
    y_r, y_x = operation(*r), operation(*x)
    g = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    found = apply_rule(operation, r, x, g)
    given = sum((m * (b - a)).sum() for m, a, b in zip(found, r, x, strict=True))
    assert given.item() == pytest.approx((g * (y_x - y_r)).sum().item(), rel=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("size", [1e4, 1e30, 1e150])
@pytest.mark.parametrize("target", [aten.cumprod.default, aten.prod.dim_int], ids=str)
def test_products_of_many_pass_nothing_that_is_huge(target, size, dim):
    """Of four factors two were huge at the one end and the others at the other."""
    base = torch.tensor([[1.5, -2.0, 0.5, 3.0], [1.0, 1.0, 2.0, -1.0]]).double()
    r = torch.stack([base, base]).movedim(2, dim).contiguous()
    x = (r * 0.5 + 0.1).contiguous()
    r.movedim(dim, 2)[0, 0, :2] *= size
    x.movedim(dim, 2)[0, 0, 2:] *= size
    summed = target is aten.cumprod.default
    rows = (1, 1 if summed else 0) if dim == 0 else (0, 0)
    operation, _ = Operation.bind(target, (r, dim), rows=rows)
    ends = [operation(end) for end in (r, x)]
    (m,) = apply_rule(operation, [r], [x], torch.ones_like(ends[0]))
    parts, owed, most = m * (x - r), ends[1] - ends[0], torch.maximum(ends[0].abs(), ends[1].abs())
    if summed:
        owed, most = owed.sum(dim), most.sum(dim)
    assert ((parts.sum(dim) - owed).abs() <= 1e-14 * most).all()
    assert (parts.abs().amax(dim) <= 1e4 * most.clamp(min=1)).all()


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("size", [1e3, 1e30, 1e150])
def test_sums_of_exponentials_so_far_keep_the_digits_of_their_change(size, dim):
    """The derivatives of what moves far cancelled, and PyTorch's had lost a small cotangent."""
    r = torch.tensor([[0.0, -1.0, 2.0, 0.5], [0.5, 0.5, 0.0, 1.0]]).double()
    r, x = torch.stack([r, 2 * r]), torch.stack([r + 1, r])
    r[0, 0] = r.new_tensor([0.0, -size, size, 1.0])
    x[0, 0] = r.new_tensor([-size, 0.0, size, 3 * size])
    r[1, 1], x[1, 1] = 0.0, size  # all alike
    r, x = (end.movedim(2, dim).contiguous() for end in (r, x))
    rows = (1, 1) if dim == 0 else (0, 0)
    operation, _ = Operation.bind(aten.logcumsumexp.default, (r, dim), rows=rows)
    for g in (torch.ones_like(r), torch.full_like(r, 0.25 / size)):
        (m,) = apply_rule(operation, [r], [x], g)
        parts, change = m * (x - r), g * (operation(x) - operation(r))
        error = (parts.sum(dim) - change.sum(dim)).abs()
        assert (error <= 1e-14 * change.abs().sum(dim).clamp(min=float(g.max()))).all()


# --- what 100,000 draws of every rule have found --------------------------------------------------


@FLOATS
@pytest.mark.parametrize("far", [1e3, 9714451324.636723, 1e25])
@pytest.mark.parametrize("masked", [False, True])
def test_log_softmax_adds_up_where_a_logit_was_all_of_its_row(masked, far, dtype):
    """Of g (1 - m) nothing was left, where m is 1 - 1/far and the others are not asked about."""
    r, x = (torch.tensor([[a, -4.5, 1.0, -0.5]], dtype=dtype) for a in (far, -2.0))
    if masked:
        r[:, 1] = x[:, 1] = -math.inf
    g = torch.tensor([[1.5, 0.0, 0.0, 0.0]], dtype=dtype)
    operation = operation_of("log_softmax.int", args=(-1,))
    (m,) = apply_rule(operation, [r], [x], g)
    given = m[0, 0].double() * (x[0, 0].double() - r[0, 0].double())
    owed = (g * (operation(x) - operation(r)))[0, 0]
    assert given.item() == pytest.approx(owed.item(), rel=4 * torch.finfo(dtype).eps)


def restores(target: Any, r: list[Tensor], x: list[Tensor], grad: Tensor, *others: Any) -> float:
    """Relative error of the sum over everything; infinite where a multiplier is not finite."""
    rows = [None] * (len(r) + 1)
    operation, _ = Operation.bind(target, (*r, *others), slots=tuple(range(len(r))), rows=rows)
    change = operation(*x).double() - operation(*r).double()
    owed = torch.where(grad == 0, 0.0, grad.double() * change).sum()
    found = apply_rule(operation, r, x, grad)
    if not all(m.isfinite().all() for m in found):
        return math.inf
    given = sum(
        (m.double() * (b.double() - a.double())).sum() for m, a, b in zip(found, r, x, strict=True)
    )
    return float((given - owed).abs() / owed.abs())


@FLOATS
def test_a_determinant_of_denormal_numbers_has_multipliers(dtype):
    """On the way, where torch divides by its pivots, its derivative is no number."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    r = torch.tensor([[0.0, 0.0, 0.4], [-0.4, -0.4, -0.4], [0.0, 3e-30, -0.4]], dtype=dtype)
    r[2, 0] = -4 * least
    r[0, 1] = 1000 * least
    x = r.clone()
    x[:, 1] = torch.tensor([0.4, -0.4, -0.4])
    for ends in ([r], [x]), ([x], [r]):
        for target in (aten.linalg_det.default, aten.det.default):
            (m,) = apply_rule(
                Operation.bind(target, ends[0])[0], *ends, torch.ones((), dtype=dtype)
            )
            assert m.isfinite().all()
            change = (torch.linalg.det(ends[1][0]) - torch.linalg.det(ends[0][0])).item()
            given = (m * (ends[1][0] - ends[0][0])).sum().item()
            assert given == pytest.approx(change, rel=10 * TOLERANCE[dtype])


def test_products_that_overflow_on_the_way_add_up():
    """From -7e34 to 0 past 3e39; what cancels was infinite and made all of the row NaN."""
    r, x = torch.tensor([-4.3e10, 1.6e24, 3.0]), torch.tensor([-0.0, 6.9e28, 3.0])
    assert restores(aten.prod.dim_int, [r], [x], torch.ones(()), 0) < 1e-6
    (base_r, new_r), (base_x, new_x) = r.split([1, 2]), x.split([1, 2])
    for own in (True, False):

        def scattered(base: Tensor, new: Tensor, own: bool = own) -> Tensor:
            places = torch.zeros(len(new), dtype=torch.long)
            return aten.scatter_reduce.two(base, 0, places, new, "prod", include_self=own)

        ends = ([base_r, new_r], [base_x, new_x]) if own else ([base_r, r], [base_x, x])
        assert restores(scattered, *ends, torch.ones(1)) < 1e-6


def test_what_is_owed_for_a_huge_step_may_be_infinite():
    """2 * 1.9e38 is more than any float32, but by a step of 5e26 it has a multiplier of 7e11."""
    r, x = torch.tensor([5.2e26, 3.6e11]), torch.tensor([-4.2, 3.6e11])
    for target in (aten.cumprod.default, aten.prod.dim_int):
        operation, _ = Operation.bind(target, (r, 0), rows=(None, None))
        (m,) = apply_rule(operation, [r], [x], torch.full_like(operation(r), 2.0))
        assert m[0].item() == pytest.approx(2 * 3.6e11, rel=1e-6)


def test_what_has_no_batch_is_one_row():
    """Three quantiles of 6 x 3 numbers counted as 3 rows of 6, one of which did not move."""
    r = torch.arange(18.0).reshape(6, 3) * 7 % 18
    x = r.clone()
    x[0] += 100.0
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    assert restores(aten.quantile.default, [r], [x], torch.ones(3), quantiles) < 1e-6


@FLOATS
def test_a_gate_of_a_cell_shuts_on_a_state_of_ten_thousand(dtype):
    """Half of z (h - n), by way of z and by way of h, cancelled: 1e-3 in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cell = nn.GRU(3, 4)
    cell = cell.to(dtype)
    h_r = torch.tensor([[[0.0, 4.0, 9929.0, 0.0]]], dtype=dtype)
    h_x = torch.tensor([[[0.0, 4.0, 0.0, -1e-6]]], dtype=dtype)
    sequence = torch.zeros(2, 1, 3, dtype=dtype)
    weights, options = [w.detach() for w in cell.parameters()], (True, 1, 0.0, False, False, False)
    operation, _ = Operation.bind(
        aten.gru.input, (sequence, h_r, weights, *options), slots=(1,), rows=(1, 1, 1)
    )
    before, after = operation(h_r)[0], operation(h_x)[0]
    (m,) = apply_rule(operation, [h_r], [h_x], (torch.ones_like(before), None))
    given = (m.double() * (h_x.double() - h_r.double())).sum().item()
    owed = (after.double() - before.double()).sum().item()
    assert given == pytest.approx(owed, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])


@FLOATS
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [1e8, 4e18])
def test_sums_of_products_move_in_one_order_past_what_is_huge(size, turned, dtype):
    """A cotangent under which mixed ends of 5e27 cancelled lost the digits of what they share."""
    r = [torch.tensor([[1e-20, 44.0]]), torch.tensor([[-size, 5.0]])]
    x = [torch.tensor([[-size, 44.5]]), torch.tensor([[-1e-30, 3.0]])]
    r, x = ([value.to(dtype) for value in end] for end in ((x, r) if turned else (r, x)))
    weight = torch.tensor([[[1.0, 0.5], [0.25, 1.0]], [[-1.0, 0.5], [0.5, 2.0]]], dtype=dtype)
    g = torch.ones(1, 2, dtype=dtype)
    assert restores(aten.bilinear.default, r, x, g, weight, None) < TOLERANCE[dtype]
    operation, _ = Operation.bind(aten.einsum.default, ("bi,bi->b", r), slots=(1, 2))
    found = apply_rule(operation, r, x, g[:, 0])
    parts = torch.cat([m * (b - a) for m, a, b in zip(found, r, x, strict=True)])
    owed = (operation(*x) - operation(*r)).item()
    assert parts.sum().item() == pytest.approx(owed, rel=TOLERANCE[dtype])
    assert parts.abs().max() <= 100 * size


def test_rows_of_ordinary_size_keep_the_midpoint_beside_huge_ones():
    r = [torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, -1.0], [-1e9, 1.0]])]
    x = [torch.tensor([[0.5, 4.0], [1e9, 1.0]]), torch.tensor([[2.0, 1.5], [0.0, 1.0]])]
    operation, _ = Operation.bind(aten.linalg_vecdot.default, r, slots=(0, 1))
    found = apply_rule(operation, r, x, torch.ones(2))
    for m, a, b in zip(found, reversed(r), reversed(x), strict=True):
        torch.testing.assert_close(m[0], (a[0] + b[0]) / 2)
