"""The reference tape: cached while nothing changes, recorded again when something does."""

import copy

import numpy as np
import pytest
import shap
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
import fxshap.runtime.batching
import fxshap.runtime.program
import fxshap.runtime.references
from fxshap.autograd.tape import Tape
from tests.helpers import as_list, assert_exact, assert_same_values, explain, multipliers
from tests.networks import NETWORKS


class Model(nn.Module):
    """Weights and buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("shift", torch.randn(8))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.hidden(x)) + self.shift))


@pytest.fixture
def recorded(monkeypatch) -> list[Tape]:
    """Every tape recorded in the test."""
    tapes: list[Tape] = []

    def record(*args, **kwargs) -> Tape:
        tapes.append(Tape(*args, **kwargs))
        return tapes[-1]

    monkeypatch.setattr(fxshap.runtime.program, "Tape", record)
    return tapes


def data(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def test_one_tape_serves_all_samples_outputs_and_calls(recorded):
    explainable = fxshap.make_explainable(Model())
    explainer = shap.DeepExplainer(explainable, data(6, 1))
    for seed in (2, 3):
        explainer.shap_values(data(4, seed))
    assert len(recorded) == 1
    other = shap.DeepExplainer(explainable, data(6, 1).clone())
    other.shap_values(data(4, 2))
    assert len(recorded) == 1


def step(model: nn.Module) -> None:
    """One step of gradient descent, batch norm statistics and all."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    model(data(8, 9)).square().sum().backward()
    optimizer.step()
    model.eval()


def other_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value * 1.5 if value.is_floating_point() else value.clone()
        for name, value in model.state_dict().items()
    }


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    model.hidden.weight.add_(0.5)


@torch.no_grad()
def buffer_in_place(model: nn.Module) -> None:
    model.shift.mul_(-1)


@torch.no_grad()
def running_mean(model: nn.Module) -> None:
    model.norm.running_mean += 1


def new_parameter(model: nn.Module) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)


def new_buffer(model: nn.Module) -> None:
    model.shift = model.shift * 3


def new_data(model: nn.Module) -> None:
    model.hidden.bias.data = torch.ones(8)


def new_module(model: nn.Module) -> None:
    model.hidden = nn.Linear(4, 8)


def to_and_back(model: nn.Module) -> None:
    model.to(torch.float64)
    with torch.no_grad():
        model.head.weight.mul_(2)
    model.to(torch.float32)


def data_in_place(model: nn.Module) -> None:
    """The old way around autograd, which does not change the version counter."""
    model.hidden.weight.data.add_(0.5)


CHANGES = [
    step,
    lambda model: model.load_state_dict(other_state(model)),
    lambda model: model.load_state_dict(other_state(model), assign=True),
    in_place,
    buffer_in_place,
    running_mean,
    new_parameter,
    new_buffer,
    new_data,
    new_module,
    to_and_back,
    data_in_place,
]
NAMES = ["optimizer_step", "load_state_dict", "load_state_dict_assign"]


@pytest.mark.parametrize(
    "change", CHANGES, ids=NAMES + [change.__name__ for change in CHANGES[len(NAMES) :]]
)
def test_recorded_again_when_a_weight_or_buffer_changes(change):
    model = Model()
    explainable = fxshap.make_explainable(model)
    background, samples = [data(6, 1)], [data(3, 2)]
    before = assert_exact(model, explainable, background, samples, 1e-5)

    change(model)

    found = assert_exact(model, explainable, background, samples, 1e-5)
    assert not np.array_equal(found[0], before[0])
    fresh = explain(fxshap.make_explainable(copy.deepcopy(model)), background, samples)
    assert_same_values(found, fresh)


@pytest.mark.parametrize("rows", [6, 4, 1])
def test_recorded_again_when_the_references_change(rows, recorded):
    model = Model()
    explainable = fxshap.make_explainable(model)
    explain(explainable, [data(6, 1)], [data(3, 2)])
    found = assert_exact(model, explainable, [data(rows, 5)], [data(3, 2)], 1e-5)
    assert len(recorded) == 2
    fresh = explain(fxshap.make_explainable(model), [data(rows, 5)], [data(3, 2)])
    assert_same_values(found, fresh)


def test_references_changed_in_place_are_noticed():
    model = Model()
    explainable = fxshap.make_explainable(model)
    background = data(6, 1)
    explain(explainable, [background], [data(3, 2)])
    background[2] += 1
    found = explain(explainable, [background], [data(3, 2)])
    assert_same_values(found, explain(fxshap.make_explainable(model), [background], [data(3, 2)]))


def test_two_explainers_of_one_model_interleaved():
    model = Model()
    explainable = fxshap.make_explainable(model)
    backgrounds = [data(6, 1), data(6, 4), data(2, 7)]
    explainers = [shap.DeepExplainer(explainable, background) for background in backgrounds]
    for seed in (2, 3):
        for explainer, background in zip(explainers, backgrounds, strict=True):
            found = as_list(explainer.shap_values(data(2, seed)))
            fresh = explain(fxshap.make_explainable(model), [background], [data(2, seed)])
            assert_same_values(found, fresh)


# --- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", ["zeros", "one_step", "equal", "constant"])
def test_time_folded_into_rows_is_seen_whatever_the_first_rows(special):
    """(T, B, C) -> (T * B, C): the rows of one sample do not lie together."""
    network = NETWORKS["time_folded"]
    model = network.build()
    (background,), (samples,) = network.inputs(4, seed=1), network.inputs(3, seed=2)
    if special == "equal":
        samples[0] = background[0]
    elif special == "constant":
        background[0], samples[0] = 0.5, 2.0
    else:
        background[0], samples[0] = 0, 0
        samples[0, -1] = 0 if special == "zeros" else 1
    assert_exact(model, fxshap.make_explainable(model), [background], [samples], 1e-5)


@pytest.mark.parametrize("masked", [-1e9, torch.finfo(torch.float32).min])
def test_time_folded_into_rows_is_seen_behind_a_mask(masked):
    """Compared with numbers of 1e9 all others look equal."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mask = torch.tensor([0.0, masked, 0.0, masked])
            self.head = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            folded = x.transpose(0, 1).reshape(-1, 4)
            weights = torch.softmax(3 * folded + self.mask, -1)
            return self.head(weights.reshape(3, -1, 4).transpose(0, 1).flatten(1))

    model = Folded()
    background, samples = data(12, 1).reshape(4, 3, 4), data(6, 2).reshape(2, 3, 4)
    assert_exact(model, fxshap.make_explainable(model), [background], [samples], 1e-5)


# --- batched outputs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "gelu_functional", "encoder_layer_time_first_gelu", "lstm_bidirectional_state",
        "gru_stacked_bidirectional_projected", "max_pool2d_overlapping", "time_folded",
        "exponentials_powers_logarithms", "softmax_output", "masked_fill", "tabnet",
        "fourier_magnitude",
    ],
)  # fmt: skip
def test_batched_outputs_equal_those_of_one_at_a_time(name, monkeypatch):
    network = NETWORKS[name]
    background = network.inputs(4, seed=1, dtype=torch.float64)
    samples = network.inputs(3, seed=2, dtype=torch.float64)
    explainable = fxshap.make_explainable(network.build().double())
    together = explain(explainable, background, samples)
    engine = explainable._calls.captures.latest
    assert engine.references.cached_tape.recordings.keys() > {1} or engine.layout.tile
    monkeypatch.setattr(fxshap.runtime.batching, "MAX_BATCHED", 0)
    single = explain(fxshap.make_explainable(network.build().double()), background, samples)
    for a, b in zip(together, single, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# --- driven by hand -----------------------------------------------------------------------------


def test_rows_that_differ_get_what_each_gets_by_itself():
    network = NETWORKS["encoder_layer_batch_first_relu"]
    explainable = fxshap.make_explainable(network.build().double())
    references = network.inputs(3, seed=1, dtype=torch.float64)
    samples = network.inputs(3, seed=2, dtype=torch.float64)
    _, (together,) = multipliers(explainable, samples, references, 0)
    for row in range(3):
        alike = [x[row : row + 1].expand_as(x) for x in samples]
        _, (single,) = multipliers(explainable, alike, references, 0)
        assert torch.allclose(together[row], single[row], rtol=1e-12, atol=1e-14)


def test_backward_passes_may_come_in_any_order():
    model = Model()
    explainable = fxshap.make_explainable(model)
    joints = [torch.cat([data(3, seed), data(3, seed + 10)]).requires_grad_() for seed in range(3)]
    with fxshap.multiplier_mode():
        outputs = [explainable(joint) for joint in joints]
    late = {k: torch.autograd.grad(outputs[k][:, 0].sum(), joints[k])[0] for k in (1, 2, 0)}
    for k, joint in enumerate(joints):
        with fxshap.multiplier_mode():
            (soon,) = torch.autograd.grad(explainable(joint)[:, 0].sum(), joint)
        assert torch.equal(late[k], soon)


def test_an_odd_number_of_rows_is_no_pair():
    explainable = fxshap.make_explainable(Model())
    with fxshap.multiplier_mode(), pytest.raises(fxshap.errors.InputError, match="come in pairs"):
        explainable(data(5, 0).requires_grad_())
