"""`verify` measures what its documentation defines, and names the operations that leak."""

import inspect
import json
import re
from unittest import mock

import numpy as np
import pytest
import shap
import torch
import torch.nn.functional as F
from shap.explainers._deep import deep_utils
from torch import Tensor, nn

import fxshap
from fxshap import InputError, OptionError, OutputError
from fxshap.rules import RULES, Rule
from fxshap.rules.core import dispatch
from fxshap.rules.core.dispatch import choose_rule
from fxshap.verification.leaks import local_errors
from fxshap.verification.metrics import additivity_error
from fxshap.verification.result import SHAP_TOLERANCE
from fxshap.verification.shapley import shapley_values
from tests.helpers import assert_no_shap_hooks, assert_same_state, explain, state_of
from tests.networks import NETWORKS

aten = torch.ops.aten


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 9)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v  # the softmax


class Attention(nn.Module):
    """Attention in a block of its own, then an activation in the model's own forward."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.block = nn.ModuleDict({"attn": Scores(), "act": nn.Tanh()})
            self.head = nn.Linear(15, 2)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.block["act"](self.block["attn"](x))  # the tanh
        h = F.silu(h.flatten(1))  # the activation
        return self.scale * self.head(h)


def attention(scale: float = 1.0) -> nn.Module:
    return Attention(scale).double().eval()


def points(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, 3, generator=generator, dtype=torch.float64)


BACKGROUND, SAMPLES = points(5, 1), points(2, 2)
TOKENS = torch.arange(5)[:, None]


def midpoint_derivative(operation, reference, sample, grad):
    """A rule that does not add up."""
    middle = (reference[0] + sample[0]) / 2
    return fxshap.rules.vjp(operation, [middle], grad)


def not_a_number(operation, reference, sample, grad):
    return (grad * torch.nan,)


def line_of(comment: str) -> str:
    """Return the file and the line with a comment."""
    with open(__file__) as source:
        (line,) = [n for n, text in enumerate(source, 1) if text.rstrip().endswith(comment)]
    return f"{__file__}:{line} "


# --- what is measured ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gelu_functional", "two_inputs", "encoder_layer_time_first_gelu"])
def test_errors_and_distances_are_those_of_their_definitions(name):
    network = NETWORKS[name]
    model = network.build().double()
    background = network.inputs(3, seed=1, dtype=torch.float64)
    samples = network.inputs(2, seed=2, dtype=torch.float64)

    result = fxshap.verify(model, background, samples)

    values = explain(fxshap.make_explainable(model), background, samples)
    for actual, expected in zip(result.values, values, strict=True):
        np.testing.assert_array_equal(actual, expected)
    phi = torch.cat([torch.from_numpy(value).flatten(1, -2) for value in values], 1)
    sizes = [x[0].numel() for x in samples]

    def function(rows: Tensor) -> Tensor:
        parts = zip(rows.split(sizes, 1), samples, strict=True)
        return model(*[part.reshape(-1, *x.shape[1:]) for part, x in parts])

    flat_x, flat_r = (torch.cat([x.flatten(1) for x in xs], 1) for xs in (samples, background))
    with torch.no_grad():
        f_x, f_r = function(flat_x), function(flat_r)
    gap = (phi.sum(1) - (f_x - f_r.mean(0))).abs().amax(1)
    largest = torch.cat([f_x, f_r]).abs().max()
    for row, sample in enumerate(result.samples):
        games = [shapley_values(function, flat_x[row], r) for r in flat_r]
        exact = torch.stack(games).mean(0)
        distance = (phi[row] - exact).abs().sum() / exact.abs().sum()
        assert sample.shap_gap == pytest.approx(float(gap[row]), abs=1e-15)
        assert sample.additivity_error == pytest.approx(float(gap[row] / largest), abs=1e-15)
        assert sample.shapley_distance == pytest.approx(float(distance), abs=1e-12)
        assert sample.output_difference <= 1e-12
    assert result.additive and result.passes_shap and not result.leaks
    assert result.additivity_error == pytest.approx(
        additivity_error(model, background, samples, values), abs=1e-15
    )


def test_output_difference_is_that_of_the_outputs_that_shap_receives():
    model = attention()
    explainable = fxshap.make_explainable(model, BACKGROUND)
    engine = explainable._calls.captures.latest
    tapped = engine.program.tapped

    def shifted(rows):
        output, taps = tapped(rows)
        return output + 0.25, taps

    with mock.patch.object(engine.program, "tapped", shifted):
        result = fxshap.verify(explainable, BACKGROUND, SAMPLES)
    with torch.no_grad():
        largest = torch.cat([model(SAMPLES), model(BACKGROUND)]).abs().max()
    for sample in result.samples:
        assert sample.output_difference == pytest.approx(0.25 / float(largest), abs=1e-12)


def test_groups_of_features_are_single_players():
    model = attention()
    by_token = fxshap.verify(model, BACKGROUND, SAMPLES, feature_mask=TOKENS)
    by_dims = fxshap.verify(
        fxshap.make_explainable(model, refine=fxshap.Refinement(0, feature_dims=(1,))),
        BACKGROUND,
        SAMPLES,
    )
    assert by_token.features == by_dims.features == 5
    assert by_token.samples == by_dims.samples
    one_group = fxshap.verify(model, BACKGROUND, SAMPLES, feature_mask=torch.full((5, 3), 7))
    assert one_group.features == 1  # whose Shapley value is the difference itself
    assert all(sample.shapley_distance < 1e-12 for sample in one_group.samples)


def test_groups_may_span_inputs():
    network = NETWORKS["two_inputs"]
    background, samples = network.inputs(3, seed=1), network.inputs(1, seed=2)
    masks = [torch.arange(x[0].numel()).reshape(x.shape[1:]) for x in samples]
    result = fxshap.verify(network.build(), background, samples, feature_mask=masks)
    assert result.features == max(x[0].numel() for x in samples)


def test_many_features_have_no_exact_values():
    result = fxshap.verify(attention(), BACKGROUND, SAMPLES)
    assert [sample.shapley_distance for sample in result.samples] == [None, None]
    assert "15 features are more than 12" in str(result)


def test_the_first_sample_always_has_exact_values(monkeypatch):
    monkeypatch.setattr("fxshap.verification.metrics.MAX_ROWS", 1)
    result = fxshap.verify(attention(), BACKGROUND, SAMPLES, feature_mask=TOKENS)
    assert [sample.shapley_distance is None for sample in result.samples] == [False, True]


def test_ranked_outputs_are_the_largest_of_every_sample():
    model, samples = attention(), points(3, 5)
    result = fxshap.verify(model, BACKGROUND, samples, ranked_outputs=1)
    (values,) = explain(fxshap.make_explainable(model), [BACKGROUND], [samples])
    with torch.no_grad():
        top = model(samples).argmax(1)
    assert len(set(top.tolist())) == 2
    for row, column in enumerate(top):
        # One output and several batched outputs use different matrix products.
        actual, expected = result.values[0][row, ..., 0], values[row, ..., column]
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)
    assert result.additive


def test_values_far_from_shapley_are_warned_of():
    siren = NETWORKS["siren"]
    background, samples = siren.inputs(3, seed=1), siren.inputs(1, seed=2)
    result = fxshap.verify(siren.build(), background, samples)
    assert result.additive and result.near_shapley is False
    assert f"WARNING: the distance to Shapley of {result.shapley_distance:.2f} is over 0.5" in str(
        result
    )
    for name, options in {
        "rule='variance'": {"rule": "variance"},
        "refine=8": {"refine": 8},
    }.items():
        model = fxshap.make_explainable(siren.build(), **options)
        distance = fxshap.verify(model, background, samples).shapley_distance
        assert result.alternatives[name] == pytest.approx(distance, rel=1e-4)
        assert f"{distance:.2f} with {name}" in str(result)
    exact = fxshap.verify(
        fxshap.make_explainable(siren.build(), refine="exact"), background, samples
    )
    assert exact.near_shapley is True and exact.shapley_distance < 1e-5
    assert "WARNING" not in str(exact) and not exact.alternatives
    many = fxshap.verify(nn.Linear(13, 1), torch.randn(2, 13), torch.randn(1, 13))
    assert many.near_shapley is None and many.to_dict()["near_shapley"] is None


def test_a_sample_that_is_its_own_reference_has_no_distance():
    model = attention()
    result = fxshap.verify(
        model, BACKGROUND[:1].repeat(3, 1, 1), BACKGROUND[:2], feature_mask=TOKENS
    )
    assert result.samples[0].shapley_distance == 0.0
    assert 0 < result.samples[1].shapley_distance < 10
    assert result.near_shapley is (result.samples[1].shapley_distance <= 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_output_that_only_rounding_changes_has_no_distance(dtype):
    class Constant(nn.Module):
        def forward(self, x):
            return 1000 + (x.sum(1, keepdim=True) - x.flip(1).sum(1, keepdim=True)).tanh()

    result = fxshap.verify(
        Constant(), torch.randn(3, 6, dtype=dtype), torch.randn(2, 6, dtype=dtype)
    )
    assert result.additive and result.shapley_distance == 0.0 and result.near_shapley


# --- verdict --------------------------------------------------------------------------------------


def test_the_tolerance_is_shaps():
    source = inspect.getsource(deep_utils._check_additivity)
    assert re.findall(r"TOLERANCE = (\S+)", source) == ["1e-2"]
    assert SHAP_TOLERANCE == 1e-2


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_gap_that_shap_accepts_is_reported(scale):
    """SHAP's check is absolute: its result depends on the scale of the outputs."""
    model = attention(scale)
    with mock.patch.dict(RULES, {aten.tanh: Rule("wrong", midpoint_derivative)}):
        result = fxshap.verify(model, BACKGROUND, SAMPLES)
        explainer = shap.DeepExplainer(fxshap.make_explainable(model), BACKGROUND)
        try:
            explainer.shap_values(SAMPLES)
            passes = True
        except AssertionError:
            passes = False
    assert not result.additive
    assert result.passes_shap is passes is (scale == 1.0)


def test_large_outputs_fail_shaps_check_by_rounding_only():
    model, background, samples = attention(1e6).float(), BACKGROUND.float(), SAMPLES.float()
    result = fxshap.verify(model, background, samples)
    with pytest.raises(AssertionError, match="do not sum up"):
        explainable = fxshap.make_explainable(model)
        shap.DeepExplainer(explainable, background).shap_values(samples)
    assert result.additive and not result.passes_shap
    assert "Explain in float64, or with check_additivity=False." in str(result)


def test_fits_eighty_columns_and_json():
    with mock.patch.dict(RULES, {aten.softmax: Rule("wrong", midpoint_derivative)}):
        result = fxshap.verify(attention(), BACKGROUND, SAMPLES)
    text = str(result)
    assert repr(result) == text
    unbroken = [line for line in text.splitlines() if __file__ not in line]
    assert max(map(len, unbroken)) <= 80
    assert json.loads(json.dumps({"text": text}))["text"] == text
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["additive"] is False
    assert plain["samples"][0]["shap_gap"] == result.samples[0].shap_gap
    assert plain["leaks"][0]["name"] == result.leaks[0].name
    assert "<table" in result._repr_html_() and "DOES NOT ADD UP" in result._repr_html_()


# --- leaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, name, operation, comment",
    [
        (aten.softmax, "block.attn.softmax", "aten.softmax.int", "# the softmax"),
        (aten.tanh, "block.act.tanh", "aten.tanh.default", "# the tanh"),
        (aten.silu, "silu", "aten.silu.default", "# the activation"),
    ],
)
@pytest.mark.parametrize("linear", [False, True], ids=["wrong rule", "false linear declaration"])
def test_a_leak_is_named(target, name, operation, comment, linear):
    wrong = Rule("linear", None) if linear else Rule("wrong", midpoint_derivative)
    with mock.patch.dict(RULES, {target: wrong}):
        result = fxshap.verify(attention(), BACKGROUND, SAMPLES)
    (leak,) = result.leaks
    assert not result.additive
    assert (leak.name, leak.operation, leak.rule) == (name, operation, wrong.name)
    assert leak.line.startswith(line_of(comment))
    assert abs(leak.error) == pytest.approx(result.additivity_error, rel=1e-6)
    assert f"{name}: error {abs(leak.error):.0e} ({operation}, rule '{wrong.name}')" in str(result)


def test_several_leaks_come_with_the_largest_first():
    wrong = Rule("wrong", midpoint_derivative)
    with mock.patch.dict(RULES, {aten.softmax: wrong, aten.tanh: wrong, aten.silu: wrong}):
        result = fxshap.verify(attention(), BACKGROUND, SAMPLES)
    sizes = [abs(leak.error) for leak in result.leaks]
    assert sizes == sorted(sizes, reverse=True)
    assert {leak.operation for leak in result.leaks} <= {
        "aten.softmax.int", "aten.tanh.default", "aten.silu.default"
    }  # fmt: skip
    assert abs(sum(leak.error for leak in result.leaks)) == pytest.approx(
        result.additivity_error, rel=0.05
    )


def test_nan_is_among_the_leaks():
    with mock.patch.dict(RULES, {aten.tanh: Rule("wrong", not_a_number)}):
        result = fxshap.verify(attention(), BACKGROUND, SAMPLES)
    assert not result.additive and np.isnan(result.additivity_error)
    assert "block.act.tanh" in {leak.name for leak in result.leaks}


@pytest.mark.parametrize(
    "name", ["encoder_layer_time_first_gelu", "lstm_bidirectional_state", "sort_topk",
             "piecewise_by_where", "fourier_magnitude"],
)  # fmt: skip
def test_the_leaks_of_all_nodes_sum_to_the_gap(name, monkeypatch):
    """With exact rules, and with rules that lose a tenth of every multiplier."""
    network = NETWORKS[name]
    model = network.build().double()
    background = network.inputs(3, seed=1, dtype=torch.float64)
    samples = network.inputs(1, seed=2, dtype=torch.float64)
    explainable = fxshap.make_explainable(model)

    def nine_tenths(operation, values):
        rule = choose_rule(operation, values)

        def multiply(*arguments):
            return tuple(None if m is None else 0.9 * m for m in rule.backward(*arguments))

        return Rule(rule.name, multiply)

    for short in (False, True):
        if short:
            monkeypatch.setattr(dispatch, "choose_rule", nine_tenths)
        values = fxshap.verify(explainable, background, samples).values
        with torch.no_grad():
            change = (model(*samples) - model(*background).mean(0))[0, 0]
        lacking = float(change) - sum(phi[0, ..., 0].sum() for phi in values)
        errors = local_errors(explainable.rescaled_graph, samples, background, 0)
        assert sum(errors.values()) == pytest.approx(lacking, abs=1e-12)
        assert (max(map(abs, errors.values())) > 1e-3) is short


# --- state of the model, options and errors -----------------------------------------------------


def test_leaves_the_model_as_it_was():
    model = attention().train()
    before = state_of(model)
    explainable = fxshap.make_explainable(model)
    fxshap.verify(model, BACKGROUND, SAMPLES)
    fxshap.verify(explainable, BACKGROUND, SAMPLES)
    assert_same_state(model, before)
    assert explainable.training and not explainable._forward_hooks
    assert_no_shap_hooks(explainable)


def test_chooses_an_output_and_refines():
    class Named(Attention):
        def forward(self, x: Tensor):
            return {"logits": super().forward(x), "rest": x}

    model = Named().double().eval()
    one = fxshap.verify(model, BACKGROUND, SAMPLES, output="logits", feature_mask=TOKENS)
    refined = fxshap.verify(
        fxshap.make_explainable(
            model, output="logits", refine=fxshap.Refinement(4, feature_dims=(1,))
        ),
        BACKGROUND,
        SAMPLES,
    )
    assert one.additive and refined.additive
    assert refined.samples[0].shapley_distance < one.samples[0].shapley_distance


def test_wrong_arguments_raise_with_their_name():
    explainable = fxshap.make_explainable(attention())
    with pytest.raises(OptionError, match="give output= to make_explainable"):
        fxshap.verify(explainable, BACKGROUND, SAMPLES, output=0)
    with pytest.raises(InputError, match="background has 1 inputs, but the samples have 2"):
        fxshap.verify(explainable, BACKGROUND, [SAMPLES, SAMPLES])
    with pytest.raises(OptionError, match="feature_mask describes 2 inputs"):
        fxshap.verify(explainable, BACKGROUND, SAMPLES, feature_mask=[SAMPLES[0].long()] * 2)
    with pytest.raises(OptionError, match="does not broadcast to the shape of one row"):
        fxshap.verify(explainable, BACKGROUND, SAMPLES, feature_mask=torch.arange(4))


BAD_INPUTS = {
    "arrays": (BACKGROUND.numpy(), SAMPLES, "background is a ndarray, not a torch.Tensor"),
    "no references": (BACKGROUND[:0], SAMPLES, "input 0 of the background has no rows"),
    "no samples": (BACKGROUND, SAMPLES[:0], "input 0 of the samples has no rows"),
    "one row": (BACKGROUND, SAMPLES[0], "but (3,) in the samples"),
    "another type": (
        BACKGROUND.float(),
        SAMPLES.float(),
        "but the model's weights torch.float64",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_wrong_inputs_raise_with_their_name(name):
    background, samples, message = BAD_INPUTS[name]
    with pytest.raises(InputError, match=re.escape(message)):
        fxshap.verify(attention(), background, samples)


def test_an_output_without_columns_raises():
    with pytest.raises(OutputError, match="every row of the inputs"):
        fxshap.verify(nn.Flatten(0), BACKGROUND, SAMPLES)


def test_progress_goes_to_standard_error(capfd):
    fxshap.verify(attention(), BACKGROUND, SAMPLES, progress=True)
    out, err = capfd.readouterr()
    assert not out
    assert "explaining" in err and "/4 [" in err
