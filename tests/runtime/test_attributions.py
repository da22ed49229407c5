"""Where outputs outnumber inputs, multipliers are carried forward, with the same attributions."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxshap
from fxshap.errors import RuleError
from fxshap.runtime import attributions
from tests.networks import NETWORKS

OUTPUTS = 40  # more than twice the ten features


class Wide(nn.Module):
    """A network whose outputs are combined into many."""

    def __init__(self, model: nn.Module, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.classes = model, nn.Linear(outputs, OUTPUTS)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.classes(self.model(*inputs))


def explainer_of(name: str, **options) -> tuple[fxshap.DeepExplainer, list[Tensor]]:
    network = NETWORKS[name]
    model = Wide(network.build(), network.outputs).double()
    background, samples = (
        list(network.inputs(count, seed=seed, dtype=torch.float64))
        for count, seed in ((4, 1), (5, 2))
    )
    return fxshap.DeepExplainer(model, background, **options), samples


@pytest.mark.parametrize("name", list(NETWORKS)[::3])
def test_values_are_those_of_backward_passes(name):
    explainer, samples = explainer_of(name)
    forward = explainer.shap_values(samples)
    # Half of the outputs at a time are explained backward.
    halves = [explainer.shap_values(samples, outputs=range(start, start + 20)) for start in (0, 20)]
    for found, *parts in zip(*map(as_list, (forward, *halves)), strict=True):
        expected = np.concatenate(parts, -1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def as_list(values) -> list[np.ndarray]:
    return values if isinstance(values, list) else [values]


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """Records the direction in which each batch is explained."""
    found: list[str] = []
    for name in ("_by_input", "_by_output"):
        original = getattr(attributions.PairBatches, name)

        def recorded(self, *args, _name=name, _original=original):
            found.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(attributions.PairBatches, name, recorded)
    return found


def test_the_direction_is_that_of_the_fewer_passes(passes):
    explainer, samples = explainer_of("gelu_functional", batch_size=2)
    explainer.shap_values(samples)
    assert passes == ["_by_input"] * 3
    passes.clear()
    explainer.shap_values(samples, outputs=range(20))
    assert passes == ["_by_output"] * 3


def test_rules_that_are_not_linear_go_backward(passes):
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            square = torch.tanh(x).reshape(-1, 3, 3) + 4 * torch.eye(3)
            return torch.linalg.inv(square).flatten(1).repeat(1, 4)

    explainer = fxshap.DeepExplainer(Inverse(), torch.randn(4, 9), batch_size=1)
    explainer.shap_values(torch.randn(3, 9))
    assert passes == ["_by_input", "_by_output", "_by_output", "_by_output"]


@pytest.mark.parametrize(
    "options", [{"rule": "variance"}, {"compile": True}, {"reference_batch_size": 2}]
)
def test_options_keep_their_values(options):
    explainer, samples = explainer_of("gelu_functional", **options)
    forward = explainer.shap_values(samples)
    backward = explainer.shap_values(samples, outputs=range(20))
    np.testing.assert_allclose(
        forward[..., :20], backward, rtol=0, atol=1e-12 * np.abs(backward).max()
    )


def test_an_output_without_dependence_gets_zeros():
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), OUTPUTS) + 0 * x.detach()[:, :1]

    explainer = fxshap.DeepExplainer(Constant(), torch.randn(4, 3))
    assert not explainer.shap_values(torch.randn(2, 3)).any()


def test_rules_that_cannot_be_differentiated_go_backward(passes, monkeypatch):
    def fails(*_: object) -> None:
        raise RuleError("functions with out=... arguments don't support automatic differentiation")

    monkeypatch.setattr(attributions.SampleReferencePairs, "jvp_many", fails)
    explainer, samples = explainer_of("gelu_functional", batch_size=3)
    explainer.shap_values(samples)
    assert passes == ["_by_input", "_by_output", "_by_output"]


def test_the_largest_tensor_of_a_recurrent_layer_counts():
    """Its gates are larger than what it receives, so fewer samples are stacked."""
    explainer, samples = explainer_of("lstm_time_first_stacked")
    explainer.shap_values(samples)
    engine = explainer._calls.captures.latest
    assert engine.largest > engine.layout.largest > 0
