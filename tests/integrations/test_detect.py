"""SHAP, Captum and tangermeme are recognised by what they do, and everyone else gets the model."""

import types
import warnings
from importlib.metadata import version

import captum.attr as ca
import numpy as np
import pytest
import shap
import tangermeme.deep_lift_shap as tangermeme
import torch
import torch.nn.functional as F
from shap.explainers._deep import deep_pytorch
from tangermeme.ersatz import dinucleotide_shuffle, shuffle
from tangermeme.pisa import pisa
from tangermeme.saliency import saliency
from tangermeme.utils import random_one_hot
from torch import Tensor, nn

import fxshap
from fxshap.errors import InputError, RecognitionError
from tests.helpers import (
    assert_no_shap_hooks,
    assert_same_state,
    explain,
    hooks,
    state_of,
)

EXACT = 1e-13  # absolute, of outputs near 1 in float64

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting forward, backward hooks", "ignore:Setting backward hooks", "ignore:Input Tensor"
)


class Model(nn.Module):
    """In-place and reused activations, a gate that takes integers, and outputs of 3 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.Linear(20, 6)
        self.gates = nn.Embedding(3, 6)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor, gate: Tensor | None = None, scale: float = 1.0) -> Tensor:
        h = self.act(self.conv(x)).flatten(1)
        h = F.gelu(self.mix(h)) * scale
        if gate is not None:
            h = h * self.gates(gate).sigmoid()
        return torch.softmax(self.head(h), 1).unflatten(1, (2, 3))


def data(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, 5, generator=generator, dtype=torch.float64)


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build()


@pytest.fixture(scope="module")
def explainable(model) -> nn.Module:
    return fxshap.make_explainable(model)


@pytest.fixture(scope="module")
def flat(model) -> nn.Module:
    """The same model with outputs of two dimensions, the only ones that SHAP takes."""
    return fxshap.make_explainable(model, output=lambda y: y.flatten(1))


@pytest.fixture(autouse=True)
def nothing_is_left(model, explainable, flat):
    """Check after every test that the model is as it was, and answers plainly."""
    before = state_of(model)
    yield
    for x in (SAMPLES, REFERENCES, BACKGROUND):
        x.requires_grad_(False)  # which Captum does not do when it fails
    assert_same_state(model, before)
    for asked in (explainable, flat):
        assert_no_shap_hooks(asked)
        assert not hooks(asked) and not hooks(asked._probe)
        assert asked.active_library == "plain"


SAMPLES, REFERENCES, BACKGROUND = data(3, 1), data(3, 2), data(4, 3)
GATE = torch.tensor([0, 2, 1])


# --- Captum -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "baselines",
    [None, 0.5, REFERENCES[:1], REFERENCES],
    ids=["zeros", "number", "one", "each"],
)
def test_captum_deep_lift(explainable, baselines):
    found, delta = ca.DeepLift(explainable).attribute(
        SAMPLES, baselines, target=(1, 2), return_convergence_delta=True
    )
    assert found.shape == SAMPLES.shape and found.abs().max() > 1e-3
    assert delta.shape == (3,) and delta.abs().max() <= EXACT


TARGETS = {
    "tuple": (0, 2),
    "tuples": [(0, 2), (1, 1), (1, 0)],
}
TARGETS_FLAT = {
    "int": 4,
    "list": [5, 0, 3],
    "tensor_of_one": torch.tensor(2),
    "tensor": torch.tensor([5, 0, 3]),
}


@pytest.mark.parametrize("method", [ca.DeepLift, ca.DeepLiftShap])
@pytest.mark.parametrize("name", [*TARGETS, *TARGETS_FLAT, "none"])
def test_captum_targets_of_every_kind(model, explainable, flat, method, name):
    chosen = flat if name in TARGETS_FLAT else explainable
    if name == "none":
        chosen = fxshap.make_explainable(model, output=lambda y: y[:, 1, 1])
    target = {**TARGETS, **TARGETS_FLAT}.get(name)
    references = REFERENCES if method is ca.DeepLift else BACKGROUND
    _, delta = method(chosen).attribute(
        SAMPLES, references, target=target, return_convergence_delta=True
    )
    assert delta.numel() == (3 if method is ca.DeepLift else 12)
    assert delta.abs().max() <= EXACT


def test_captum_deep_lift_shap_is_shaps_value(explainable, flat):
    """A baseline distribution in Captum is a background in SHAP."""
    found = ca.DeepLiftShap(explainable).attribute(SAMPLES, BACKGROUND, target=(1, 2))
    (expected,) = explain(flat, [BACKGROUND], [SAMPLES])
    np.testing.assert_allclose(found.detach().numpy(), expected[..., 5], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", [ca.DeepLift, ca.DeepLiftShap])
def test_captum_additional_arguments_go_along_row_by_row(explainable, method):
    references = REFERENCES if method is ca.DeepLift else BACKGROUND
    options = {"target": (1, 2), "return_convergence_delta": True}
    found, delta = method(explainable).attribute(
        SAMPLES, references, additional_forward_args=(GATE, 2.0), **options
    )
    assert delta.abs().max() <= EXACT
    for row in range(3):
        chosen = slice(row, row + 1)
        one, _ = method(explainable).attribute(
            SAMPLES[chosen], references[chosen] if method is ca.DeepLift else references,
            additional_forward_args=(GATE[chosen], 2.0), **options,
        )  # fmt: skip
        torch.testing.assert_close(one[0], found[row], rtol=1e-12, atol=1e-15)


def test_captum_several_inputs_and_its_other_options(explainable):
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a * b.sigmoid()).flatten(1)

    two = fxshap.make_explainable(Two())
    inputs, baselines = (SAMPLES, data(3, 4)), (REFERENCES, data(3, 5))
    found, delta = ca.DeepLift(two).attribute(
        inputs, baselines, target=3, return_convergence_delta=True
    )
    assert len(found) == 2 and delta.abs().max() <= EXACT

    bare = ca.DeepLift(explainable, multiply_by_inputs=False)
    attributed = ca.DeepLift(explainable).attribute(SAMPLES, REFERENCES, target=(1, 2))
    multipliers = bare.attribute(SAMPLES, REFERENCES, target=(1, 2))
    torch.testing.assert_close(multipliers * (SAMPLES - REFERENCES), attributed)
    own = ca.DeepLift(explainable).attribute(
        SAMPLES, REFERENCES, target=(1, 2), custom_attribution_func=lambda m, x, r: (m[0] * 2,)
    )
    torch.testing.assert_close(own, 2 * multipliers)


LAYERS = ["conv", "act", "mix", "head"]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", LAYERS)
def test_captum_layers(model, explainable, name, side):
    layer = explainable.get_submodule(name)
    options = {
        "target": (1, 2),
        "attribute_to_layer_input": side == "input",
        "return_convergence_delta": True,
    }
    found, delta = ca.LayerDeepLift(explainable, layer).attribute(SAMPLES, REFERENCES, **options)
    with (
        torch.no_grad(),
        fxshap.frontend.hook_point.record_tensors(
            model, fxshap.frontend.hook_point.HookPoint(name, side)
        ) as seen,
    ):
        model(SAMPLES)
    assert found.shape == seen[0][0].shape
    assert delta.abs().max() <= EXACT
    _, delta = ca.LayerDeepLiftShap(explainable, layer).attribute(SAMPLES, BACKGROUND, **options)
    assert delta.shape == (12,) and delta.abs().max() <= EXACT


def test_captum_layers_with_additional_arguments(explainable):
    _, delta = ca.LayerDeepLift(explainable, explainable.mix).attribute(
        SAMPLES, REFERENCES, target=(1, 2), additional_forward_args=(GATE, 2.0),
        return_convergence_delta=True,
    )  # fmt: skip
    assert delta.abs().max() <= EXACT


def test_captum_neurons_are_refused_by_name(model, explainable):
    with pytest.raises(InputError, match="requests the gradient of the output of 'mix' itself"):
        ca.NeuronDeepLift(explainable, model.mix).attribute(SAMPLES, 2, REFERENCES)


def test_what_is_bound_must_be_the_same_in_both_rows_of_a_pair(explainable):
    rows = torch.cat([SAMPLES, REFERENCES]).requires_grad_()
    gates = torch.cat([GATE, GATE.flip(0)])
    for call in (lambda: explainable(rows, gates), lambda: explainable(rows, gate=gates)):
        with (
            fxshap.multiplier_mode(),
            pytest.raises(InputError, match="(input 1|'gate') is not explained"),
        ):
            call()


# --- tangermeme ---------------------------------------------------------------------------------


class Sequences(nn.Module):
    """One-hot sequences to two numbers, through operations that tangermeme has no rules for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 6, 5, padding=2), nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = F.gelu(self.first(x))
        h = (h + self.second(h).sigmoid() * h).amax(2)
        return self.head(h if scale is None else h * scale)


@pytest.fixture(scope="module")
def sequences() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Sequences().double().eval()


@pytest.fixture(scope="module")
def explained(sequences) -> nn.Module:
    return fxshap.make_explainable(sequences)


ONE_HOT = random_one_hot((3, 4, 20), random_state=0).double()
OPTIONS = {"n_shuffles": 3, "random_state": 0, "device": "cpu", "warning_threshold": EXACT}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"references": shuffle},
        {"references": dinucleotide_shuffle, "batch_size": 4},
        {"target": 1, "args": (torch.linspace(0, 2, 18).reshape(3, 6).double(),)},
        {"hypothetical": True},
    ],
    ids=["default", "shuffled", "dinucleotides", "args", "hypothetical"],
)
def test_tangermeme(sequences, explained, options):
    before = state_of(sequences)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns of convergence deltas that are too high
        found = tangermeme.deep_lift_shap(explained, ONE_HOT, **OPTIONS, **options)
        raw, references = tangermeme.deep_lift_shap(
            explained, ONE_HOT, raw_outputs=True, return_references=True, **OPTIONS, **options
        )
    assert_same_state(sequences, before)
    contributions = tangermeme.hypothetical_attributions(
        (raw.flatten(0, 1),), (ONE_HOT.repeat_interleave(3, 0),), (references.flatten(0, 1),)
    )[0].unflatten(0, (3, 3))
    expected = contributions.mean(1) * (1 if "hypothetical" in options else ONE_HOT)
    torch.testing.assert_close(found, expected)

    args, target = options.get("args", ()), options.get("target", 0)
    with torch.no_grad():
        f_x = sequences(ONE_HOT, *args)[:, None, target]
        along = [a.repeat_interleave(3, 0) for a in args]
        f_r = sequences(references.flatten(0, 1), *along)[:, target].unflatten(0, (3, 3))
    change = (raw * (ONE_HOT[:, None] - references)).sum((2, 3))
    torch.testing.assert_close(change, f_x - f_r, rtol=0, atol=EXACT)


def test_tangermeme_pisa(sequences, explained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        references = shuffle(ONE_HOT[:1], n=3, random_state=0)
        options = {**OPTIONS, "references": references}
        found = pisa(explained, ONE_HOT[:1], **options)
        one = tangermeme.deep_lift_shap(explained, ONE_HOT[:1], target=1, **options)
    assert found.shape == (1, 2, 4, 20)
    torch.testing.assert_close(found[:, 1], one)


# --- methods of ordinary gradients --------------------------------------------------------------

GRADIENTS = {
    "saliency": lambda m, x: ca.Saliency(m).attribute(x, target=(1, 2)),
    "input_x_gradient": lambda m, x: ca.InputXGradient(m).attribute(x, target=(1, 2)),
    "integrated_gradients": lambda m, x: ca.IntegratedGradients(m).attribute(x, target=(1, 2)),
    "gradient_shap": lambda m, x: ca.GradientShap(m).attribute(x, BACKGROUND, target=(1, 2)),
    "guided_backprop": lambda m, x: ca.GuidedBackprop(m).attribute(x, target=(1, 2)),
    "deconvolution": lambda m, x: ca.Deconvolution(m).attribute(x, target=(1, 2)),
    "guided_grad_cam": lambda m, x: ca.GuidedGradCam(m, m.conv).attribute(x, target=(1, 2)),
    "layer_grad_cam": lambda m, x: ca.LayerGradCam(m, m.conv).attribute(x, target=(1, 2)),
    "layer_gradient_x_activation": lambda m, x: ca.LayerGradientXActivation(m, m.mix).attribute(
        x, target=(1, 2)
    ),
    "layer_integrated_gradients": lambda m, x: ca.LayerIntegratedGradients(m, m.mix).attribute(
        x, target=(1, 2)
    ),
    "neuron_gradient": lambda m, x: ca.NeuronGradient(m, m.mix).attribute(x, 2),
    "feature_ablation": lambda m, x: ca.FeatureAblation(m).attribute(x, target=(1, 2)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_captum_gradient_methods_get_the_plain_model(model, explainable, name):
    def values(module: nn.Module) -> Tensor:
        torch.manual_seed(0)
        np.random.seed(0)
        return GRADIENTS[name](module, SAMPLES)

    assert torch.equal(values(explainable), values(model))


def test_shap_gradient_explainer_of_a_layer_gets_the_plain_model():
    flat = nn.Sequential(build().float(), nn.Flatten())
    explainable = fxshap.make_explainable(flat)

    def values(module: nn.Module) -> np.ndarray:
        explainer = shap.GradientExplainer((module, flat[0].mix), BACKGROUND.float())
        return explainer.shap_values(SAMPLES.float(), nsamples=10, rseed=0)

    np.testing.assert_array_equal(values(explainable), values(flat))


def test_tangermeme_saliency_gets_the_plain_model(sequences, explained):
    assert torch.equal(
        saliency(explained, ONE_HOT, device="cpu"), saliency(sequences, ONE_HOT, device="cpu")
    )


# --- who is asking ------------------------------------------------------------------------------


def test_the_mode_tells_who_is_asking(flat, explained):
    modes: list[str] = []

    def note(module: nn.Module, *_) -> None:
        modes.append(module.active_library)

    with flat.register_forward_hook(note):
        shap.DeepExplainer(flat, BACKGROUND).shap_values(SAMPLES[:1])
        assert modes == ["plain", *["shap"] * 6, "plain"]
        modes.clear()
        ca.DeepLift(flat).attribute(SAMPLES, target=1, return_convergence_delta=True)
        assert modes == ["captum", "plain", "plain"]
        modes.clear()
        ca.IntegratedGradients(flat).attribute(SAMPLES, target=1, n_steps=2)
        assert set(modes) == {"plain"}
    modes.clear()
    with explained.register_forward_hook(note):
        tangermeme.deep_lift_shap(explained, ONE_HOT, **OPTIONS)
        assert set(modes) == {"tangermeme"}
    with fxshap.multiplier_mode():
        assert flat.active_library == "multiplier_mode"
    assert flat.active_library == "plain"


def test_paired_gives_every_row_the_multiplier_of_its_own_cotangent(model, explainable):
    rows = torch.cat([SAMPLES, REFERENCES]).requires_grad_()
    with fxshap.multiplier_mode():
        outputs = explainable(rows).flatten(1)
    sample, reference = torch.autograd.grad(outputs.sum(), rows, retain_graph=True)[0].chunk(2)
    assert torch.equal(sample, reference)

    weights = torch.linspace(-1, 1, 6, dtype=torch.float64)
    cotangent = torch.cat([weights.expand(3, 6), torch.zeros(3, 6)])
    sample, reference = torch.autograd.grad(outputs, rows, cotangent)[0].chunk(2)
    f_x, f_r = (model(x).detach().flatten(1) for x in (SAMPLES, REFERENCES))
    total = (sample * (SAMPLES - REFERENCES)).sum((1, 2))
    torch.testing.assert_close(total, (f_x - f_r) @ weights, rtol=0, atol=EXACT)
    assert not reference.any()


def test_paired_calls_without_gradient_are_plain(model, explainable):
    with fxshap.multiplier_mode():
        with torch.no_grad():
            assert torch.equal(explainable(SAMPLES), model(SAMPLES))
        assert torch.equal(explainable(SAMPLES), model(SAMPLES))


def test_an_explainable_model_may_be_part_of_another(flat):
    whole = nn.Sequential(flat, nn.Tanh())
    (values,) = explain(whole, [BACKGROUND], [SAMPLES])
    with torch.no_grad():
        change = whole(SAMPLES) - whole(BACKGROUND).mean(0)
    np.testing.assert_allclose(values.sum((1, 2)), change.numpy(), rtol=0, atol=EXACT)


def test_marks_of_a_call_that_was_broken_off_say_nothing(model, flat, monkeypatch):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    explainer = shap.DeepExplainer((flat, model.mix), BACKGROUND)
    monkeypatch.setattr(deep_pytorch.PyTorchDeep, "gradient", interrupt)
    with pytest.raises(KeyboardInterrupt):
        explainer.shap_values(SAMPLES)
    assert hooks(flat._probe) and hooks(model.mix)

    found = ca.InputXGradient(flat).attribute(SAMPLES, target=5)
    assert torch.equal(found, ca.InputXGradient(model).attribute(SAMPLES, target=(1, 2)))


# --- a release that we do not know --------------------------------------------------------------


def moved(function, module: str):
    """The same function, from a module of another name."""
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__module__ = module
    return copy


def assert_not_silent(ask, library: str) -> None:
    """Check that there is an error that names the versions."""
    with pytest.raises(RecognitionError) as raised:
        ask()
    assert f"{library} {version(library)}" in str(raised.value)
    assert f"fxshap {fxshap.__version__}" in str(raised.value)
    assert "fxshap.multiplier_mode()" in str(raised.value)


def ask_shap(flat: nn.Module) -> None:
    shap.DeepExplainer(flat, BACKGROUND).shap_values(SAMPLES)


@pytest.mark.parametrize("new", ["shap.explainers._deep.hooks", "shap.explainers._deep"])
def test_shap_hooks_may_move_within_their_package(flat, monkeypatch, new):
    for name in ("add_interim_values", "deeplift_grad"):
        monkeypatch.setattr(deep_pytorch, name, moved(getattr(deep_pytorch, name), new))
    ask_shap(flat)


def test_shap_hooks_from_elsewhere_are_an_error(flat, monkeypatch):
    for name in ("add_interim_values", "deeplift_grad"):
        renamed = moved(getattr(deep_pytorch, name), "shap.deep")
        monkeypatch.setattr(deep_pytorch, name, renamed)
    assert_not_silent(lambda: ask_shap(flat), "shap")


def test_shap_without_hooks_is_an_error(flat, monkeypatch):
    monkeypatch.setattr(deep_pytorch.PyTorchDeep, "add_handles", lambda *_: [])
    assert_not_silent(lambda: ask_shap(flat), "shap")


def test_captum_without_hooks_is_an_error(explainable, monkeypatch):
    monkeypatch.setattr(ca.DeepLift, "_register_hooks", lambda *_: None)
    ask = ca.DeepLift(explainable).attribute
    assert_not_silent(lambda: ask(SAMPLES, REFERENCES, target=(1, 2)), "captum")


def test_captum_hooks_from_elsewhere_are_an_error(explainable, monkeypatch):
    for name in ("_forward_hook", "_forward_pre_hook"):
        renamed = moved(getattr(ca.DeepLift, name), "captum.attr.rescale")
        monkeypatch.setattr(ca.DeepLift, name, renamed)
    ask = ca.DeepLift(explainable).attribute
    assert_not_silent(lambda: ask(SAMPLES, REFERENCES, target=(1, 2)), "captum")


def test_tangermeme_without_hooks_is_an_error(explained, monkeypatch):
    monkeypatch.setattr(tangermeme, "_register_hooks", lambda module: None)
    ask = tangermeme.deep_lift_shap
    assert_not_silent(lambda: ask(explained, ONE_HOT, **OPTIONS), "tangermeme")


def test_inside_paired_a_release_that_we_do_not_know_works(flat, monkeypatch):
    monkeypatch.setattr(deep_pytorch.PyTorchDeep, "add_handles", lambda *_: [])
    with fxshap.multiplier_mode():
        ask_shap(flat)


def test_captum_lrp_finds_no_layers(explainable):
    """It walks over the children of a model, and the user's are out of reach."""
    with pytest.raises(TypeError, match="has no rule defined"):
        ca.LRP(explainable).attribute(SAMPLES, target=(1, 2))
