"""What the multipliers are: divided differences and Shapley values, finite at the extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import fxshap.rules  # noqa: F401, it fills the table
from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import DECOMPOSITIONS
from fxshap.rules.maximum import max_multiplier
from fxshap.testing.rule_check import ROWS, Case, Varying, additivity_errors, cotangents
from fxshap.verification.shapley import shapley_values
from tests.rules.rule_cases import ALL, constant, v

aten = torch.ops.aten
inf = math.inf


def multipliers(target: Any, r: tuple[Tensor, ...], x: tuple[Tensor, ...], *constants: Any) -> Any:
    """Return the multipliers of a sum of outputs."""
    operation, _ = Operation.bind(target, (*r, *constants), slots=range(len(r)))
    return apply_rule(operation, r, x, torch.ones_like(operation(*r)))


# --- smooth functions: the divided difference ---------------------------------------------------


def log1p_exp(z: Any) -> Any:
    return mpmath.log1p(mpmath.exp(z))


def sigmoid(z: Any) -> Any:
    return 1 / (1 + mpmath.exp(-z))


#: Operator, constants, exact function, range of r.
SMOOTH: dict[str, tuple[Any, tuple[Any, ...], Callable[[Any], Any], tuple[float, float]]] = {
    "exp": (aten.exp.default, (), mpmath.exp, (-20, 20)),
    "expm1": (aten.expm1.default, (), mpmath.expm1, (-20, 20)),
    "exp2": (aten.exp2.default, (), lambda z: mpmath.mpf(2) ** z, (-20, 20)),
    "log": (aten.log.default, (), mpmath.log, (0.01, 20)),
    "log2": (aten.log2.default, (), lambda z: mpmath.log(z, 2), (0.01, 20)),
    "log1p": (aten.log1p.default, (), mpmath.log1p, (-0.9, 20)),
    "sigmoid": (aten.sigmoid.default, (), sigmoid, (-30, 30)),
    "tanh": (aten.tanh.default, (), mpmath.tanh, (-15, 15)),
    "softplus": (aten.softplus.default, (), log1p_exp, (-30, 19)),
    "log_sigmoid": (aten.log_sigmoid.default, (), lambda z: -log1p_exp(-z), (-19, 30)),
    "silu": (aten.silu.default, (), lambda z: z * sigmoid(z), (-20, 20)),
    "mish": (aten.mish.default, (), lambda z: z * mpmath.tanh(log1p_exp(z)), (-20, 18)),
    "elu": (aten.elu.default, (), lambda z: z if z > 0 else mpmath.expm1(z), (-20, 20)),
    "sqrt": (aten.sqrt.default, (), mpmath.sqrt, (0.01, 20)),
    "rsqrt": (aten.rsqrt.default, (), lambda z: 1 / mpmath.sqrt(z), (0.01, 20)),
    "reciprocal": (aten.reciprocal.default, (), lambda z: 1 / z, (0.01, 20)),
    "square": (aten.square.default, (), lambda z: z * z, (-20, 20)),
    "pow 3": (aten.pow.Tensor_Scalar, (3,), lambda z: z**3, (-20, 20)),
    "pow -2": (aten.pow.Tensor_Scalar, (-2,), lambda z: z**-2, (0.01, 20)),
    "pow 1.5": (aten.pow.Tensor_Scalar, (1.5,), lambda z: z ** mpmath.mpf(1.5), (0.01, 20)),
    "sin": (aten.sin.default, (), mpmath.sin, (-7, 7)),
    "cos": (aten.cos.default, (), mpmath.cos, (-7, 7)),
    "erf": (aten.erf.default, (), mpmath.erf, (-4, 4)),
    "ndtr": (aten.special_ndtr.default, (), mpmath.ncdf, (-20, 4)),
    "atan": (aten.atan.default, (), mpmath.atan, (-20, 20)),
    "asinh": (aten.asinh.default, (), mpmath.asinh, (-20, 20)),
    "sinh": (aten.sinh.default, (), mpmath.sinh, (-20, 20)),
    "tan": (aten.tan.default, (), mpmath.tan, (-1.4, 1.4)),
}

#: No closed form: a quadrature of the derivative where the quotient is worse.
BY_QUADRATURE = ("pow 1.5", "atan", "asinh", "sinh", "tan")
#: Their slopes pass through 0, where no relative error is small.
CROSSING = ("sin", "cos", "silu", "mish")


@pytest.mark.parametrize("name", SMOOTH)
def test_slopes_are_divided_differences(name: str) -> None:
    """In float64 against 60 digits, for d = 0 and d from 1e-12 to 0.3, relative to the slope."""
    target, constants, exact, (low, high) = SMOOTH[name]
    r = torch.linspace(low, high, 37, dtype=torch.float64)[:, None] + 0.0123
    x = r + torch.cat([torch.zeros(1), torch.logspace(-12, -0.5, 24, dtype=torch.float64)])
    r = r.expand_as(x)
    (found,) = multipliers(target, (r,), (x,), *constants)
    with mpmath.workdps(60):
        true = torch.tensor(
            [
                float(secant(exact, mpmath.mpf(a), mpmath.mpf(b)))
                for a, b in zip(r.flatten().tolist(), x.flatten().tolist(), strict=True)
            ],
            dtype=torch.float64,
        ).reshape(x.shape)
    counted = true.abs() > (0.02 if name in CROSSING else 0)
    error = (found / true - 1).abs()[counted]
    assert error.max() <= (1e-11 if name in BY_QUADRATURE else 5e-14)


def secant(exact: Callable[[Any], Any], a: Any, b: Any) -> Any:
    """Divided difference at 60 digits, across a step of 1e-25 where the ends are equal."""
    if a == b:
        a, b = a - mpmath.mpf("5e-26"), a + mpmath.mpf("5e-26")
    return (exact(b) - exact(a)) / (b - a)


# --- kinks --------------------------------------------------------------------------------------

TINY = torch.logspace(-12, -1, 12, dtype=torch.float64)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hardswish", "hardsigmoid", "elu", "abs"])
@pytest.mark.parametrize("side", [-1, 1])
def test_from_a_kink_to_either_side_the_slope_is_that_side_s(name: str, side: int) -> None:
    target = getattr(aten, name).default
    kinks = torch.tensor([[-3.0], [0.0], [3.0]] if name.startswith("hard") else [[0.0]])
    kink = kinks.double().expand(-1, 12)
    other = kink + side * TINY
    for r, x in ((kink, other), (other, kink)):
        (slope,) = multipliers(target, (r,), (x,))
        change = target(x) - target(r)
        torch.testing.assert_close(slope * (x - r), change, rtol=1e-12, atol=1e-15)


def test_prelu_has_a_slope_for_each_channel() -> None:
    weight = torch.tensor([0.1, -0.5, 2.0], dtype=torch.float64)
    r = torch.full((12, 3), -0.7, dtype=torch.float64)
    (slope,) = multipliers(aten.prelu.default, (r,), (r + TINY[:, None],), weight)
    torch.testing.assert_close(slope, weight.expand(12, 3), rtol=1e-15, atol=0)


def test_relu_multipliers_lie_between_0_and_1() -> None:
    r, x = torch.randn(2, 10000)
    (slope,) = multipliers(aten.relu.default, (r,), (x,))
    assert slope.min() >= 0
    assert slope.max() <= 1


def test_square_root_at_0_has_a_finite_multiplier() -> None:
    zero = torch.zeros(3)
    assert multipliers(aten.sqrt.default, (zero,), (zero,))[0].eq(0).all()
    for target in (aten.std.correction, aten.linalg_vector_norm.default):
        assert multipliers(target, (zero,), (zero,))[0].eq(0).all()


# --- Shapley values -----------------------------------------------------------------------------


@pytest.mark.parametrize("players", range(2, 7))
@pytest.mark.parametrize("ties", [False, True])
def test_maximum_is_the_shapley_value(players: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(players)
    for _ in range(20):
        r, x = torch.randn(2, players, generator=generator, dtype=torch.float64)
        if ties:
            r, x = (2 * r).round() / 2, (2 * x).round() / 2
        exact = shapley_values(lambda z: z.amax(1, keepdim=True), x, r).squeeze(1)
        multiplier = max_multiplier(r, x)
        torch.testing.assert_close(multiplier * (x - r), exact, rtol=0, atol=1e-14)
        assert multiplier.min() >= 0
        assert multiplier.max() <= 1 + 1e-15


def test_masked_elements_of_a_maximum_get_nothing() -> None:
    r = torch.tensor([[-inf, 1.0, 2.0], [-inf, 3.0, 3.0]])
    x = torch.tensor([[-inf, 4.0, 2.0], [-inf, 3.0, 3.0]])
    expected = torch.tensor([[0.0, 2 / 3, 0.0], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(max_multiplier(r, x), expected)


def test_maximum_of_many_shares_as_few_do() -> None:
    r, x = torch.zeros(1, 200, dtype=torch.float64), torch.ones(1, 200, dtype=torch.float64)
    torch.testing.assert_close(max_multiplier(r, x), x / 200)


@pytest.mark.parametrize(
    ("target", "function"),
    [
        (aten.mul.Tensor, lambda z: z[:, :1] * z[:, 1:]),
        (aten.div.Tensor, lambda z: z[:, :1] / z[:, 1:]),
        (aten.maximum.default, lambda z: z.amax(1, keepdim=True)),
        (aten.minimum.default, lambda z: z.amin(1, keepdim=True)),
        (aten.atan2.default, lambda z: torch.atan2(z[:, :1], z[:, 1:])),
        (aten.pow.Tensor_Tensor, lambda z: z[:, :1] ** z[:, 1:]),
        (aten.xlogy.Tensor, lambda z: torch.xlogy(z[:, :1], z[:, 1:])),
    ],
    ids=["mul", "div", "maximum", "minimum", "atan2", "pow", "xlogy"],
)
def test_two_factors_share_as_two_players(target: Any, function: Any) -> None:
    r, x = 0.5 + torch.rand(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = multipliers(target, tuple(r.split(1)), tuple(x.split(1)))
    exact = shapley_values(function, x, r).squeeze(1)
    torch.testing.assert_close(torch.cat(found) * (x - r), exact, rtol=1e-14, atol=1e-15)


def test_three_numbers_share_as_three_players() -> None:
    r, x = torch.tensor([[0.2, -0.5, 0.3], [2.0, 0.5, 1.0]], dtype=torch.float64)
    exact = shapley_values(lambda z: z[:, :1].clamp(z[:, 1:2], z[:, 2:]), x, r).squeeze(1)
    found = multipliers(aten.clamp.Tensor, tuple(r.split(1)), tuple(x.split(1)))
    torch.testing.assert_close(torch.cat(found) * (x - r), exact, rtol=1e-14, atol=1e-15)


def test_a_mixture_outside_the_domain_is_shared_equally() -> None:
    """(-2)^2 to 3^0.5: of the mixtures, (-2)^0.5 is no number."""
    r, x = (torch.tensor(end, dtype=torch.float64) for end in ([-2.0, 2.0], [3.0, 0.5]))
    found = multipliers(aten.pow.Tensor_Tensor, tuple(r.split(1)), tuple(x.split(1)))
    half = (3**0.5 - 4) / 2
    torch.testing.assert_close(torch.cat(found) * (x - r), torch.tensor([half, half]).to(r))


def test_determinant_shares_among_its_entries() -> None:
    r, x = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = shapley_values(
        lambda z: torch.linalg.det(z.reshape(-1, 3, 3)).unsqueeze(1), x, r
    ).squeeze(1)
    operation, _ = Operation.bind(aten.linalg_det.default, (r.reshape(1, 3, 3),), rows=(0, 0))
    ends = [r.reshape(1, 3, 3)], [x.reshape(1, 3, 3)]
    (found,) = apply_rule(operation, *ends, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(found.flatten() * (x - r), exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["bilinear", "nearest", "bicubic"])
def test_coordinates_of_a_sampled_point_share_as_two_players(mode: int) -> None:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)
    r, x = torch.rand(2, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.8
    weights = torch.tensor([1.0, -0.4], dtype=torch.float64).reshape(1, 2, 1, 1)

    def sampled(z: torch.Tensor) -> torch.Tensor:
        images = image.expand(len(z), *image.shape[1:])
        out = aten.grid_sampler.default(images, z.reshape(-1, 1, 1, 2), mode, 0, False)
        return (out * weights).sum((1, 2, 3)).unsqueeze(1)

    exact = shapley_values(sampled, x, r).squeeze(1)
    points = r.reshape(1, 1, 1, 2)
    operation, _ = Operation.bind(
        aten.grid_sampler.default, (image, points, mode, 0, False), slots=(1,), rows=(0, 0)
    )
    (found,) = apply_rule(operation, [points], [x.reshape(1, 1, 1, 2)], weights)
    torch.testing.assert_close(found.flatten() * (x - r), exact, rtol=1e-12, atol=1e-13)


def test_select_shares_between_condition_and_branches() -> None:
    c, a, b = (torch.tensor([value], dtype=torch.float64) for value in (0.0, 2.0, 5.0))
    found = multipliers(torch.ops.fxshap.select.default, (c, a, b), (c + 1, a + 4, b + 2))
    assert torch.cat(found).tolist() == [4.0 - 6.0, 0.5, 0.5]


def test_infinite_branch_that_is_not_chosen_is_owed_nothing() -> None:
    """where(x > 0, log(x), 0) from a reference below 0, whose logarithm is nan."""
    c_r, c_x = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])
    a_r, a_x = torch.tensor([math.nan, -inf]), torch.tensor([2.0, -inf])
    operation, _ = Operation.bind(
        torch.ops.fxshap.select.default, (c_r, a_r, torch.zeros(2)), slots=(0, 1)
    )
    to_c, to_a = apply_rule(operation, (c_r, a_r), (c_x, a_x), torch.ones(2))
    assert (to_c * (c_x - c_r)).tolist() == [2.0, 0.0]
    assert to_a.tolist() == [0.0, 0.0]


# --- softmax at the extremes --------------------------------------------------------------------

SOFTMAXES = (aten.softmax.int, aten._safe_softmax.default, aten.log_softmax.int)


@pytest.mark.parametrize("scale", [1, 10, 50, 100])
@pytest.mark.parametrize("target", [*SOFTMAXES, aten.logsumexp.default], ids=str)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
def test_logits_of_any_scale(target: Any, scale: float, dtype: torch.dtype, bound: float) -> None:
    dim = [1] if target is aten.logsumexp.default else 1
    case = Case(target, (v(8), dim))
    generator = torch.Generator().manual_seed(0)
    r, x = scale * torch.randn(2, 32, 8, generator=generator, dtype=torch.float64).to(dtype)
    operation, _ = Operation.bind(target, (r, dim), rows=(0, 0))
    errors, (multiplier,) = additivity_errors(case, operation, [r], [x])
    assert errors.max() <= bound
    assert multiplier.isfinite().all()


@pytest.mark.parametrize("target", SOFTMAXES, ids=str)
def test_masked_logits_get_nothing(target: Any) -> None:
    case = Case(target, (Varying((4, 6), masked=True), -1))
    operation, r, x = case.draw(torch.float32)
    (multiplier,) = apply_rule(operation, r, x, cotangents(operation(*r)))
    assert multiplier[..., 1].eq(0).all()
    assert multiplier.isfinite().all()


def test_row_that_is_masked_all_through_gets_nothing() -> None:
    r, x = torch.randn(2, 3, 4)
    r[1] = x[1] = -inf
    operation, _ = Operation.bind(aten._safe_softmax.default, (r, -1))
    (multiplier,) = apply_rule(operation, [r], [x], torch.randn(3, 4))
    assert multiplier[1].eq(0).all()
    assert multiplier.isfinite().all()


def test_softmax_multipliers_are_bounded_and_invariant_to_a_common_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    r, x = 30 * torch.randn(2, 1000, 8, generator=generator, dtype=torch.float64)
    grad = torch.rand(1000, 8, generator=generator, dtype=torch.float64)
    operation, _ = Operation.bind(aten.softmax.int, (r, 1))
    (multiplier,) = apply_rule(operation, [r], [x], grad)
    (shifted,) = apply_rule(operation, [r + 7], [x + 7], grad)
    assert multiplier.abs().max() <= 1
    torch.testing.assert_close(shifted, multiplier, rtol=0, atol=1e-12)


# --- decompositions -----------------------------------------------------------------------------


def cell(gates: int) -> list[Tensor]:
    """Weights and biases of a recurrent cell of 4 units and 3 features."""
    return [constant(gates, 3), constant(gates, 4), constant(gates), constant(gates)]


GOES_TO = torch.arange(3 * ROWS).reshape(ROWS, 3) * 5 % 4

DECOMPOSED = [
    (aten.glu.default, (v(6),), {}),
    (aten.cosine_similarity.default, (v(5), v(5)), {}),
    (aten.cdist.default, (v(3, 4), v(2, 4), 1.0, None), {}),
    (aten._cdist_forward.default, (v(3, 4), v(2, 4), 2.0, None), {}),
    (aten.addcdiv.default, (v(5), v(5), v(5, low=0.5)), {"value": 0.3}),
    (aten.logaddexp.default, (v(5), v(5)), {}),
    (aten.argsort.default, (v(5), 1, True), {}),
    (aten.argsort.stable, (v(5),), {"stable": True, "dim": 1}),
    (aten.floor_divide.default, (v(5), v(5, low=0.5)), {}),
    (aten.scaled_dot_product_attention.default, (v(2, 3, 4), v(2, 5, 4), v(2, 5, 4)), {}),
    (aten.scaled_dot_product_attention.default, (v(2, 4, 4), v(2, 4, 4), v(2, 4, 4)),
     {"is_causal": True, "scale": 0.3}),
    (aten.scaled_dot_product_attention.default, (v(4, 3, 4), v(2, 3, 4), v(2, 3, 4)),
     {"enable_gqa": True, "attn_mask": torch.eye(3, dtype=torch.bool)}),
    (aten.scatter.reduce, (v(4), 1, GOES_TO, v(3)), {"reduce": "add"}),
    (aten.scatter.reduce, (v(4), 1, GOES_TO, v(3)), {"reduce": "multiply"}),
    (aten.lstm_cell.default, (v(3), [v(4), v(4)], *cell(16)), {}),
    (aten.lstm_cell.default, (v(3), [v(4), v(4)], *cell(16)[:2]), {}),
    (aten.gru_cell.default, (v(3), v(4), *cell(12)), {}),
    (aten.rnn_tanh_cell.default, (v(3), v(4), *cell(4)), {}),
    (aten.rnn_relu_cell.default, (v(3), v(4), *cell(4)[:2]), {}),
]  # fmt: skip

EMBEDDING_BAGS = [aten.embedding_bag.default, aten.embedding_bag.padding_idx]


def test_every_decomposition_is_tried() -> None:
    others = {case.target for case in ALL if case.decomposition is not None}
    assert {target for target, _, _ in DECOMPOSED} | {*others, *EMBEDDING_BAGS} == set(
        DECOMPOSITIONS
    )


@pytest.mark.parametrize(
    ("target", "args", "kwargs"), DECOMPOSED, ids=[str(target) for target, _, _ in DECOMPOSED]
)
def test_decompositions_give_what_the_operation_gives(target: Any, args: Any, kwargs: Any) -> None:
    operation, r, _ = Case(target, args, kwargs).draw(torch.float64)
    parts = replace(operation, target=DECOMPOSITIONS[target])
    torch.testing.assert_close(parts(*r), operation(*r))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
def test_embedding_bags_give_what_the_operation_gives(
    mode: str, padding: int | None, last: bool
) -> None:
    """Bags of several sizes, one of them empty and one of padding alone."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 3, generator=generator)
    indices = torch.tensor([0, 2, 4, 4, 2, 2, 1, 3])
    offsets = torch.tensor([0, 3, 3, 4, 6, 8] if last else [0, 3, 3, 4, 6])
    weights = torch.randn(8, generator=generator) if mode == "weighted" else None
    number = {"sum": 0, "mean": 1, "max": 2, "weighted": 0}[mode]
    args = (table, indices, offsets, False, number, False, weights, last, padding)
    for target in EMBEDDING_BAGS if padding is None else EMBEDDING_BAGS[1:]:
        given = args if target is EMBEDDING_BAGS[1] else args[:-1]
        torch.testing.assert_close(DECOMPOSITIONS[target](*given)[0], target(*given)[0])


@pytest.mark.parametrize("how", ["sum", "mean", "prod", "amax", "amin"])
@pytest.mark.parametrize("own", [True, False])
def test_scattered_reduction_of_a_part(how: str, own: bool) -> None:
    """The index may be smaller than both tensors, in every dimension."""
    generator = torch.Generator().manual_seed(0)
    base, source = (torch.randn(n, 4, 3, generator=generator) for n in (5, 7))
    index = torch.tensor([[[4, 0], [2, 1], [0, 0]], [[2, 2], [2, 0], [4, 1]]])
    arguments = (base, 0, index, source, how)
    found = DECOMPOSITIONS[aten.scatter_reduce.two](*arguments, include_self=own)
    torch.testing.assert_close(found, base.scatter_reduce(*arguments[1:], include_self=own))


def test_angles_of_complex_and_of_real_numbers() -> None:
    z = torch.randn(20, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    for value in (z, z.real):
        torch.testing.assert_close(DECOMPOSITIONS[aten.angle.default](value), torch.angle(value))


# --- complex numbers, and rows folded into one dimension ----------------------------------------


def test_products_of_real_and_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    a_r, a_x = torch.randn(2, 32, 4, generator=generator, dtype=torch.float64)
    b_r, b_x = torch.randn(2, 32, 4, generator=generator, dtype=torch.complex128)
    case = Case(aten.mul.Tensor, (v(4), v(4)))
    operation, _ = Operation.bind(aten.mul.Tensor, (a_r, b_r), slots=(0, 1))
    errors, _ = additivity_errors(case, operation, [a_r, b_r], [a_x, b_x])
    assert errors.max() <= 1e-14


def test_generic_rule_corrects_the_rows_that_two_arguments_share() -> None:
    """One argument has 32 rows, the other 4 for each of them."""
    case = Case(aten.atan2.default, (v(4), v(4)))
    generator = torch.Generator().manual_seed(0)
    (a_r, b_r), (a_x, b_x) = torch.randn(2, 2, 32, 4, generator=generator, dtype=torch.float64)

    def folded(a: Tensor, b: Tensor) -> Tensor:
        return torch.atan2(a, b.reshape(32, 4))

    ends = [a_r, b_r.flatten()], [a_x, b_x.flatten()]
    operation, _ = Operation.bind(folded, ends[0], slots=(0, 1))
    errors, _ = additivity_errors(case, operation, *ends)
    assert errors.max() <= 1e-13


# --- order statistics: Shapley values ----------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("target", "constants", "value"),
    [
        (aten.sort.default, (1,), lambda s: s.sort(1).values),
        (aten.sort.default, (1, True), lambda s: s.sort(1, descending=True).values),
        (aten.topk.default, (2, 1), lambda s: s.topk(2, 1).values),
        (aten.topk.default, (2, 1, False), lambda s: s.topk(2, 1, False).values),
        (aten.kthvalue.default, (4, 1), lambda s: s.kthvalue(4, 1, True).values),
        (aten.median.dim, (1,), lambda s: s.median(1, True).values),
    ],
    ids=["sort", "descending", "topk", "smallest", "kthvalue", "median"],
)
def test_order_statistics_give_their_exact_shapley_values(target, constants, value, ties):
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        r, x = torch.randn(2, 1, 6, generator=generator, dtype=torch.float64)
        if ties:
            r, x = (2 * r).round(), (2 * x).round()
        operation, _ = Operation.bind(target, (r, *constants))
        grad = torch.randn(value(r).shape, generator=generator, dtype=torch.float64)
        outputs = operation(r)
        (multiplier,) = apply_rule(operation, (r,), (x,), (grad.reshape(outputs[0].shape), None))
        exact = shapley_values(lambda s, grad=grad: (value(s) * grad).sum(1, True), x[0], r[0])
        torch.testing.assert_close((multiplier * (x - r))[0], exact[:, 0], rtol=0, atol=1e-12)
        assert (multiplier.abs() <= grad.abs().sum() + 1e-12).all()
