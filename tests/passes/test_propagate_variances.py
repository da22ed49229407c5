"""Activations that know the variance of the sum before them: additive, and nearer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import captum.attr
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from fxshap.autograd.rescale import rescale_maximum
from fxshap.rules.core.operation import Operation
from fxshap.rules.smoothed_activations import SMOOTHED, activation, activation_rule
from fxshap.rules.smoothed_logsumexp import mean_softmax, of_logits, of_logits_rule
from fxshap.rules.smoothed_maxima import chances, smoothed_max_multipliers
from fxshap.runtime.shapley import coalitions
from fxshap.testing.rule_check import TOLERANCE, Case
from fxshap.verification.metrics import additivity_error
from fxshap.verification.shapley import shapley_values
from tests.helpers import assert_exact, assert_same_state, assert_same_values, explain, state_of
from tests.networks import NETWORKS
from tests.rules.cases import CURVES


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Applied(nn.Module):
    """An activation of what a linear function makes of the input, and a sum of all."""

    def __init__(self, linear: Callable[[Tensor], Tensor], function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.function = linear, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x)).flatten(1)


def powers(shape: tuple[int, ...], generator: torch.Generator, low: float, high: float) -> Tensor:
    """Draw numbers from 10^low to 10^high, in float64."""
    exponents = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    return 10**exponents


def signed_powers(
    shape: tuple[int, ...], generator: torch.Generator, low: float, high: float
) -> Tensor:
    """Draw such numbers with random signs."""
    sizes = powers(shape, generator, low, high)
    return sizes * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)


def moments_of(model: nn.Module, x: Tensor, r: Tensor) -> list[Tensor]:
    """The variances and shifts that the activations of a model receive between two rows."""
    explainable = fxshap.make_explainable(model, (r,), rule="variance")
    (engine,) = explainable._calls.captures.engines.values()
    program = engine.program
    program.bind_weights(None)
    (_, sample), (_, reference) = program.tapped([x]), program.tapped([r])
    return list(program.rewritten.variance_graph(reference, sample, r))


CONV = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
NORM = nn.BatchNorm2d(2).double().eval()
NORM.running_var = torch.tensor([0.3, 2.0], dtype=torch.float64)
LINEAR = nn.Linear(4, 5).double()
LINEARS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: LINEAR(x),
    "addmm": lambda x: torch.addmm(LINEAR.bias, x.flatten(1)[:, :4], LINEAR.weight.mT),
    "matrix from the left": lambda x: LINEAR.weight[:, :4] @ x,
    "convolution": lambda x: CONV(x),
    "norm and convolution": lambda x: CONV(NORM(x)),
    "transposed convolution": lambda x: F.conv_transpose2d(x, CONV.weight.transpose(0, 1)),
    "two convolutions side by side": lambda x: torch.cat([CONV(x)[:, :1], x[:, :1, ::2, ::2]], 1),
    "difference": lambda x: 3.0 - (x[:, :1] - x[:, 1:] / 4) * 2,
    "mean": lambda x: x.mean((2, 3)),
    "averages": lambda x: F.avg_pool2d(x, 2) + 1,
    "adaptive averages": lambda x: F.adaptive_avg_pool2d(x, 2),
    "moved": lambda x: torch.stack([LINEAR(x).mT, LINEAR(x).mT.flip(1)], 1).sum(2).unsqueeze(1),
}


@pytest.mark.parametrize("name", LINEARS)
def test_the_variance_of_a_sum_is_that_of_its_terms(name: str) -> None:
    linear = LINEARS[name]
    x, r = numbers(1, 2, 4, 4, seed=1), numbers(1, 2, 4, 4, seed=2)
    (variance,) = moments_of(Applied(linear, torch.tanh), x, r)
    jacobian = torch.autograd.functional.jacobian(linear, x).flatten(x.dim())
    jacobian = jacobian.reshape(*linear(x).shape, -1)
    torch.testing.assert_close(variance, jacobian.square() @ (x - r).square().flatten())


@pytest.mark.parametrize("name", LINEARS)
def test_the_shift_of_a_sum_is_the_sum_of_those_of_its_terms(name: str) -> None:
    linear = LINEARS[name]
    x, r = numbers(1, 2, 4, 4, seed=1), numbers(1, 2, 4, 4, seed=2)
    mix = numbers(4, 4, seed=3)
    hidden, hidden_r = x @ mix, r @ mix
    v = (x - r).square() @ mix.square()
    middle, deviation = (hidden + hidden_r) / 2, (v / 2).sqrt()
    points = [middle - deviation, middle, middle, middle + deviation]
    shift = sum(map(torch.relu, points)) / 4 - (hidden.relu() + hidden_r.relu()) / 2
    model = Applied(lambda x: linear((x @ mix).relu()), torch.tanh)
    first, *_, found = moments_of(model, x, r)
    torch.testing.assert_close(first, v)
    expected = linear(shift) - linear(torch.zeros_like(shift))
    torch.testing.assert_close(found, expected)


def test_the_mean_of_a_sum_is_nearer_to_that_over_the_coalitions_than_the_middle() -> None:
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 16), nn.Tanh()).double()
    with torch.no_grad():
        model[0].weight.mul_(3)
    x, r = numbers(1, 10, seed=1), numbers(1, 10, seed=2)
    *_, shift = moments_of(model, x, r)
    present = coalitions(10)
    halves = present[present.sum(1) == 5]
    sums = model[:3](torch.where(halves.bool(), x, r))
    middle = (model[:3](x) + model[:3](r)) / 2
    exact = sums.mean(0) - middle
    assert (shift - exact).abs().sum() < 0.3 * exact.abs().sum()


def test_variances_match_the_formula() -> None:
    model = nn.Sequential(nn.Linear(6, 1), nn.GELU()).double()
    (x,), (r,) = numbers(1, 6, seed=1), numbers(1, 6, seed=2)
    weight, bias = model[0].weight[0].detach(), model[0].bias[0].detach()
    u, z_x, z_r = weight * (x - r), weight @ x + bias, weight @ r + bias
    v, shift = u.square().sum(), (u.square().sum() / 3).sqrt()

    def smoothed(z: Tensor) -> Tensor:
        return (F.gelu(z - shift) + 2 * F.gelu(z) + F.gelu(z + shift)) / 4

    of_mean = (smoothed(z_x) - smoothed(z_r)) / (z_x - z_r)
    of_variance = (F.gelu(z_x) - F.gelu(z_r) - of_mean * (z_x - z_r)) / v
    expected = u * (of_mean + of_variance * u)
    (values,) = explain(fxshap.make_explainable(model, rule="variance"), [r[None]], [x[None]])
    np.testing.assert_allclose(values[0, :, 0], expected.numpy(), rtol=1e-12)


SLOPES = [case for case in CURVES if case.target.overloadpacket in SMOOTHED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", SLOPES, ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_activations_add_up_at_any_two_ends_and_moments(
    case: Case, dtype: torch.dtype, shifted: bool
) -> None:
    """From denormal numbers to 1e30, close and far, with moments small and large for them."""
    generator = torch.Generator().manual_seed(0)
    count = 4000
    # Constant arguments of a case may be tensors of its own shape.
    shape = (count, *case.args[0].shape)
    draw = partial(powers, shape, generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    r = (sign * draw(-42, 30)).to(dtype)
    x = torch.where(torch.rand(shape, generator=generator) < 0.5, r, -r / 3)
    x = x + ((torch.randint(0, 2, shape, generator=generator) * 2 - 1) * draw(-42, 30)).to(dtype)
    x[:100], r[100:200], x[200:300] = r[:100], 0.0, 0.0
    v = ((x - r).double().square() * draw(-3, 3)).to(dtype)
    rest = [a.to(dtype) if isinstance(a, Tensor) else a for a in case.args[1:]]
    moments = [v]
    if shifted:
        moments.append((v.double().sqrt() * draw(-3, 3) * sign).to(dtype))
    arguments = (r, v, moments[-1] if shifted else None, case.target, *rest)
    slots = range(1 + len(moments))
    operation, _ = Operation.bind(activation, arguments, case.kwargs, slots=slots)
    reference, sample = (r, *(0 * moment for moment in moments)), (x, *moments)
    of_mean, of_variance, *others = activation_rule(
        operation, reference, sample, torch.ones_like(r)
    )
    assert others == [None] * shifted
    assert of_mean.isfinite().all() and of_variance.isfinite().all()
    step, v = x.double() - r.double(), v.double()
    # Where v is infinite nothing is multiplied by it.
    parts = of_mean.double() * step, torch.where(of_variance == 0, 0.0, of_variance.double() * v)
    f_x, f_r = (case.target(z, *rest, **case.kwargs).double() for z in (x, r))
    size = sum(part.abs() for part in (*parts, f_x, f_r))
    error = (sum(parts) - (f_x - f_r)).abs()
    # Multipliers that are smaller than numbers of the type are lost, and PyTorch's GELU rounds
    # x (1 + erf), of which little is left in its tail.
    own = 2 * torch.finfo(dtype).eps * sum(z.double().abs().clamp(max=16) for z in (r, x))
    if "elu" in str(case) and F.elu(torch.tensor(-1e-10)) == 0:  # torch 2.6 rounds exp(x) - 1
        own = own + 4 * torch.finfo(dtype).eps
    lost = torch.finfo(dtype).tiny * (step.abs() + torch.where(v.isfinite(), v, 0.0) + 1) + own
    assert (error <= TOLERANCE[dtype] * size + lost).all()
    assert (parts[0].abs() <= 1e6 * (1 + f_x.abs() + (f_x - f_r).abs())).all()


NETWORKS_OF_ALL_KINDS = (
    "relu_in_place", "relu6_hardtanh_abs_clamp", "average_pools", "squeeze_excite", "time_folded",
    "two_inputs", "encoder_layer_time_first_gelu", "tabnet", "bpnet", "masked_fill", "codebook",
    "bucketize_embedding", "embedding_bag_of_codes", "experts_by_mask", "batch_norm",
)  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS_OF_ALL_KINDS)
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_networks_of_all_kinds_add_up(name: str, dtype: torch.dtype, limit: float) -> None:
    network = NETWORKS[name]
    model = network.build().to(dtype)
    r, x = (list(network.inputs(rows, seed=rows, dtype=dtype)) for rows in (5, 2))
    assert_exact(model, fxshap.make_explainable(model, rule="variance"), r, x, limit)


@pytest.mark.parametrize("far", [1e-160, 1e-30, 1e-12, 1.0, 1e2, 1e30, 1e160])
def test_near_and_far_ends_add_up(far: float) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = model.double()
    r = numbers(4, 6, seed=1)
    explainable = fxshap.make_explainable(model, rule="variance")
    for x in (r[:1] + far * numbers(1, 6, seed=2), r[:1]):
        # SHAP's own check is of the difference, whatever the size.
        values = explain(explainable, [r], [x], check_additivity=False)
        assert additivity_error(model, [r], [x], values) <= 1e-12


class Masked(nn.Module):
    """Logits of -inf at both endpoints, or at one, among the terms of a sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        masked = hidden.masked_fill(x[:, :1] > 0, -torch.inf)
        masked = torch.cat([masked, hidden[:, :1] - torch.inf], 1)
        return torch.cat([F.relu(masked + hidden[:, :1]), torch.sigmoid(masked + x[:, :1])], 1)


def test_what_is_masked_adds_no_variance() -> None:
    model, x, r = Masked().double(), numbers(3, 6, seed=1), numbers(4, 6, seed=2)
    assert_exact(model, fxshap.make_explainable(model, rule="variance"), [r], [x], 1e-12)


def exact_values(model: Callable[[Tensor], Tensor], x: Tensor, r: Tensor) -> Tensor:
    rows = [torch.stack([shapley_values(model, a, b) for b in r]).mean(0) for a in x]
    return torch.stack(rows)


ACTIVATIONS = [
    torch.relu, F.leaky_relu, F.elu, F.gelu, F.silu, torch.tanh, F.hardtanh, F.softplus, torch.sin,
]  # fmt: skip


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("depth, most", [(1, 0.5), (2, 0.85)])
def test_attributions_are_nearer_to_the_exact_values(
    function: Callable[[Tensor], Tensor], depth: int, most: float
) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before in (8, 16)[:depth]:
        layers += [Applied(nn.Linear(before, 16), function)]
    model = nn.Sequential(*layers, nn.Linear(16, 2)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.7)
    x, r = numbers(6, 8, seed=1), numbers(6, 8, seed=2)
    with torch.no_grad():
        exact = exact_values(model, x, r).numpy()
    distances = []
    for variances in (False, True):
        (values,) = explain(
            fxshap.make_explainable(model, rule="variance" if variances else "rescale"), [r], [x]
        )
        distances.append(np.abs(values - exact).sum())
    assert distances[1] < most * distances[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 9, 40])
def test_maxima_add_up_at_any_two_ends_and_variances(size: int, dtype: torch.dtype) -> None:
    """From denormal numbers to 1e30, close and far, at ties, with padding and without variance."""
    generator = torch.Generator().manual_seed(0)
    shape = (2000, size)
    draw = partial(signed_powers, shape, generator)

    r, x = draw(-42, 30), draw(-42, 30)
    r[:1000], x[:1000] = draw(-3, 3)[:1000], draw(-3, 3)[:1000]
    x[:100], x[100:300] = r[:100], r[100:300] + draw(-12, 2)[100:300]
    r[300:400], x[300:400] = r[300:400, :1], x[300:400, :1]
    r, x = r.to(dtype), x.to(dtype)
    v = ((x - r).double().square() * draw(-3, 3).abs()).to(dtype)
    v[400:500] = 0.0
    if size > 2:
        r[500:600, -1] = x[500:600, -1] = -torch.inf
        v[500:600, -1] = 0.0
    shift = (v.double().sqrt() * draw(-3, 3)).to(dtype)
    shift[::2] = 0.0
    of_mean, of_variance = smoothed_max_multipliers(r, x, v, shift)
    assert of_mean.isfinite().all() and of_variance.isfinite().all()
    step = torch.where(x == r, 0.0, x.double() - r.double())
    parts = of_mean.double() * step
    parts = parts + torch.where(of_variance == 0, 0.0, of_variance.double() * v.double())
    y_x, y_r = (value.double().amax(1) for value in (x, r))
    size_of_terms = parts.abs().sum(1) + (of_mean.double() * step).abs().sum(1)
    error = (parts.sum(1) - (y_x - y_r)).abs()
    # Multipliers that are smaller than numbers of the type are lost.
    lost = torch.finfo(dtype).tiny * (1 + step.abs().sum(1))
    assert (error <= TOLERANCE[dtype] * (size_of_terms + y_x.abs() + y_r.abs()) + lost).all()
    smoothed = (of_variance != 0).any(1)
    bound = 2e4 * (1 + y_x.abs() + y_r.abs())
    assert ((of_mean.double() * step).abs().sum(1) <= bound)[smoothed].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 9, 40])
@pytest.mark.parametrize("target", [torch.logsumexp, torch.log_softmax], ids=lambda f: f.__name__)
def test_functions_of_logits_add_up_at_any_two_ends_and_moments(
    target: Callable[..., Tensor], size: int, dtype: torch.dtype
) -> None:
    """Close and far, at equal logits, with masked ones and with moments small and large."""
    generator = torch.Generator().manual_seed(0)
    shape = (2000, size)
    draw = partial(signed_powers, shape, generator)

    r, x = draw(-12, 2), draw(-12, 2)
    x[:100], x[100:400] = r[:100], r[100:400] + draw(-12, 2)[100:400]
    r[400:500], x[400:500] = r[400:500, :1], x[400:500, :1]
    r, x = r.to(dtype), x.to(dtype)
    v = ((x - r).double().square() * draw(-3, 3).abs()).to(dtype)
    shift = (v.double().sqrt() * draw(-3, 1)).to(dtype)
    v[500:600] = 0.0
    if size > 2:
        r[600:700, -1] = x[600:700, -1] = -torch.inf
        r[700:750, -1] = x[750:800, -1] = -torch.inf
        v[600:800, -1] = shift[600:800, -1] = 0.0
    overload = {"logsumexp": torch.ops.aten.logsumexp.default}
    inner = overload.get(target.__name__, torch.ops.aten.log_softmax.int)
    arguments = (r, v, shift, inner, [1] if inner in overload.values() else 1)
    operation, _ = Operation.bind(of_logits, arguments, slots=(0, 1, 2))
    y_x, y_r = (target(value.double(), 1) for value in (x, r))
    grad = numbers(*y_x.shape, seed=4).to(dtype).masked_fill(y_x == -torch.inf, 0.0)
    weights, y_x, y_r = (value.double().reshape(2000, -1) for value in (grad, y_x, y_r))
    of_mean, of_variance, none = of_logits_rule(operation, (r, 0 * v, 0 * v), (x, v, shift), grad)
    assert none is None and of_mean.isfinite().all() and of_variance.isfinite().all()
    step = torch.where(x == r, 0.0, x.double() - r.double())
    usual = step.isfinite().all(1)
    parts = of_mean.double() * step + of_variance.double() * v.double()
    change = torch.where(y_x == y_r, 0.0, y_x - y_r) * weights
    error = (parts.sum(1) - change.sum(1)).abs()
    values = [torch.where(y.isfinite(), y, 0.0).abs().sum(1) for y in (y_x, y_r, x, r)]
    size_of_terms = parts.abs().sum(1) + sum(values)
    assert (error <= 10 * TOLERANCE[dtype] * size_of_terms)[usual].all()
    assert usual.sum() > 1800


def test_the_mean_of_softmax_is_near_that_of_drawn_logits() -> None:
    mean, variance = numbers(50, 5, seed=1), torch.sigmoid(numbers(50, 5, seed=2)) * 2
    drawn = mean + variance.sqrt() * numbers(20000, 50, 5, seed=3)
    exact = drawn.softmax(-1).mean(0)
    error = (mean_softmax(mean, variance) - exact).abs().sum()
    assert error < 0.6 * (mean.softmax(-1) - exact).abs().sum()


@pytest.mark.parametrize("depth, most", [(0, 0.5), (1, 0.7), (2, 0.95)])
@pytest.mark.parametrize("target", [torch.logsumexp, torch.log_softmax], ids=lambda f: f.__name__)
def test_functions_of_logits_are_nearer_to_the_exact_values(
    target: Callable[..., Tensor], depth: int, most: float
) -> None:
    torch.manual_seed(0)
    sizes = [8, *[16] * depth]
    layers = [Applied(nn.Linear(*pair), torch.tanh) for pair in zip(sizes, sizes[1:], strict=False)]
    model = nn.Sequential(
        *layers, Applied(nn.Linear(sizes[-1], 4), lambda z: target(z, 1)[:, None])
    )
    model = model.double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.5)
    x, r = numbers(6, 8, seed=1), numbers(6, 8, seed=2)
    with torch.no_grad():
        exact = exact_values(model, x, r).numpy()
    distances = []
    for rule in ("rescale", "variance"):
        (values,) = assert_exact(model, fxshap.make_explainable(model, rule=rule), [r], [x], 1e-12)
        distances.append(np.abs(values - exact).sum())
    assert distances[1] < most * distances[0]


def test_chances_are_those_of_independent_normal_numbers() -> None:
    """Of two they are known (Clark 1961); those of five are compared with a sample."""
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    pairs = list(zip(points.tolist(), (weights / weights.sum()).tolist(), strict=True))
    mean, variance = numbers(50, 5, seed=1), 0.5 + torch.sigmoid(numbers(50, 5, seed=2))
    found = chances(mean[:, :2], variance[:, :2], pairs)[:, 0]
    exact = torch.special.ndtr((mean[:, 0] - mean[:, 1]) / variance[:, :2].sum(1).sqrt())
    assert (found - exact).abs().max() < 1e-6
    drawn = mean + variance.sqrt() * numbers(20000, 50, 5, seed=3)
    frequency = F.one_hot(drawn.argmax(-1), 5).double().mean(0)
    assert (chances(mean, variance, pairs) - frequency).abs().max() < 0.02


MAXIMA_OF_SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "of two tensors": lambda z: torch.max(z, torch.ones(5).double()),
    "smaller of two tensors": lambda z: torch.min(z, torch.zeros(5).double()),
    "over a dimension": lambda z: z.max(-1)[0],
    "minimum over a dimension": lambda z: z.min(2, keepdim=True)[0],
    "over two dimensions": lambda z: z.amax((1, 3)),
    "minimum over two dimensions": lambda z: z.amin((2, 3)),
    "pooled with indices": lambda z: F.max_pool2d(z, (2, 3), return_indices=True)[0],
}


@pytest.mark.parametrize("name", MAXIMA_OF_SUMS)
def test_every_maximum_of_sums_adds_up(name: str) -> None:
    model = Applied(LINEAR, MAXIMA_OF_SUMS[name])
    x, r = numbers(2, 2, 4, 4, seed=1), numbers(3, 2, 4, 4, seed=2)
    assert_exact(model, fxshap.make_explainable(model, rule="variance"), [r], [x], 1e-12)


MAXIMA = ["max_pool1d_padded_dilated", "max_pool2d_overlapping", "max_pool3d", "adaptive_max_pool",
          "max_over_dims"]  # fmt: skip
RECURRENT = ["rnn_tanh", "rnn_relu", "lstm_time_first_stacked", "lstm_bidirectional_state",
             "gru_stacked_bidirectional_projected"]  # fmt: skip


@pytest.mark.parametrize("name", [*RECURRENT, *MAXIMA])
def test_recurrent_layers_and_maxima_are_nearer_to_the_exact_values(name: str) -> None:
    network = NETWORKS[name]
    model = network.build().double()
    (x,), (r,) = (network.inputs(6, seed=seed, dtype=torch.float64) for seed in (1, 2))

    def flat(rows: Tensor) -> Tensor:
        return model(rows.reshape(-1, *x.shape[1:]))

    with torch.no_grad():
        exact = exact_values(flat, x.flatten(1), r.flatten(1)).numpy()
    distances = []
    for rule in ("rescale", "variance"):
        explainable = fxshap.make_explainable(model, rule=rule)
        (values,) = assert_exact(model, explainable, [r], [x], 1e-12)
        distances.append(np.abs(values.reshape(exact.shape) - exact).sum())
    assert distances[1] < (0.9 if name in RECURRENT else 0.7) * distances[0]


class MaximumOfResidual(nn.Module):
    """The largest of groups of values, to which a layer was added or not."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(6, 8), nn.Linear(8, 8)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        y = self.layer(torch.tanh(h))
        y = 2 * (h + y) if self.residual else y
        return y.unflatten(1, (2, 4)).amax(2)


@pytest.mark.parametrize("residual", [False, True])
def test_maxima_after_residual_sums_keep_the_max_game(residual: bool) -> None:
    model, r = MaximumOfResidual(residual).double(), numbers(3, 6, seed=1)
    explainable = fxshap.make_explainable(model, (r,), rule="variance")
    (engine,) = explainable._calls.captures.engines.values()
    rescaled = {node.target for node in engine.program.rewritten.rescaled_graph.graph.nodes}
    assert (rescale_maximum in rescaled) is not residual
    assert_exact(model, explainable, [r], [numbers(3, 6, seed=2)], 1e-12)


def test_the_variance_rule_is_not_farther_on_a_residual_block() -> None:
    network = NETWORKS["inverted_residual"]
    model = network.build().double()
    (x,), (r,) = (network.inputs(6, seed=seed, dtype=torch.float64) for seed in (1, 2))
    exact = exact_values(
        lambda rows: model(rows.reshape(-1, *x.shape[1:])), x.flatten(1), r.flatten(1)
    )
    distances = [
        np.abs(values[0].reshape(exact.shape) - exact.numpy()).sum()
        for rule in ("rescale", "variance")
        for values in [explain(fxshap.make_explainable(model, rule=rule), [r], [x])]
    ]
    assert distances[1] <= 1.05 * distances[0]


def test_compiled_recurrent_layers_give_the_same_values() -> None:
    network = NETWORKS["rnn_tanh"]
    model = network.build()
    (x,), (r,) = (network.inputs(n, seed=n) for n in (2, 5))
    (values,) = explain(fxshap.make_explainable(model, rule="variance"), [r], [x])
    compiled = fxshap.make_explainable(model, rule="variance", compile=True)
    (compiled_values,) = assert_exact(model, compiled, [r], [x], 1e-5)
    np.testing.assert_allclose(compiled_values, values, rtol=1e-4, atol=1e-6)


def test_a_unit_of_one_input_keeps_its_secant() -> None:
    model = nn.Sequential(nn.GELU(), nn.Conv1d(3, 3, 1, groups=3), nn.ReLU(), nn.Flatten()).double()
    x, r = numbers(2, 3, 4, seed=1), numbers(5, 3, 4, seed=2)
    plain, smoothed = (
        explain(
            fxshap.make_explainable(model, rule="variance" if variances else "rescale"), [r], [x]
        )[0]
        for variances in (False, True)
    )
    # In S + T u the smoothed slope cancels; what is left of its rounding is divided by u.
    np.testing.assert_allclose(smoothed, plain, rtol=1e-10, atol=1e-12)


def perceptron(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def test_refinement_and_chunks_of_references_work_with_it() -> None:
    model, x, r = perceptron(), numbers(2, 6, seed=1), numbers(12, 6, seed=2)
    exact = exact_values(model, x, r).detach().numpy()
    distances = []
    for options in ({}, {"rule": "variance"}, {"rule": "variance", "refine": 4}):
        explainable = fxshap.make_explainable(model, **options)
        (values,) = assert_exact(model, explainable, [r], [x], 1e-12)
        explainable = fxshap.make_explainable(model, reference_batch_size=5, **options)
        np.testing.assert_allclose(explain(explainable, [r], [x])[0], values, rtol=1e-10)
        distances.append(np.abs(values - exact).sum())
    assert distances[2] < distances[1] < distances[0]


def test_new_weights_are_seen() -> None:
    model, x, r = perceptron(), numbers(2, 6, seed=1), numbers(5, 6, seed=2)
    explainable = fxshap.make_explainable(model, rule="variance")
    explain(explainable, [r], [x])
    with torch.no_grad():
        model[2].weight.mul_(-2)
    fresh = fxshap.make_explainable(model, rule="variance")
    assert_same_values(explain(explainable, [r], [x]), explain(fresh, [r], [x]))


def test_captum_and_compiled_backward_passes_give_the_same_values() -> None:
    model = perceptron(torch.float32)
    x, r = (numbers(n, 6, seed=n, dtype=torch.float32) for n in (2, 5))
    (values,) = explain(fxshap.make_explainable(model, rule="variance"), [r], [x])
    compiled = fxshap.make_explainable(model, rule="variance", compile=True)
    (compiled_values,) = assert_exact(model, compiled, [r], [x], 1e-5)
    # In float32; the compiler and pairs of rows that differ round in another order.
    np.testing.assert_allclose(compiled_values, values, rtol=1e-4, atol=1e-6)
    method = captum.attr.DeepLiftShap(fxshap.make_explainable(model, rule="variance"))
    attributed = method.attribute(x, r, target=1).detach().numpy()
    np.testing.assert_allclose(attributed, values[..., 1], rtol=1e-4, atol=1e-6)


def test_the_model_and_the_report_do_not_change() -> None:
    model, x, r = perceptron().eval(), numbers(2, 6, seed=1), numbers(5, 6, seed=2)
    before = state_of(model)
    explainable = fxshap.make_explainable(model, rule="variance")
    explain(explainable, [r], [x])
    assert_same_state(model, before)
    assert torch.equal(explainable(x), model(x))
    plain = fxshap.make_explainable(model, (r,))
    assert str(explainable.report()) == str(plain.report())
