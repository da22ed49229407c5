"""An explainable model is the user's own model in every other respect, before and after."""

import copy
import pickle

import numpy as np
import pytest
import shap
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from tests.helpers import (
    as_list,
    assert_no_shap_hooks,
    assert_same_state,
    assert_same_values,
    explain,
    state_of,
)
from tests.networks import NETWORKS


def results(module: nn.Module, model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """The output of `module` and the gradients of inputs and parameters."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = module(*leaves)
    cotangent = torch.linspace(-1, 2, output.numel()).reshape(output.shape).to(output)
    wanted = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
    return [output, *torch.autograd.grad(output, wanted, cotangent, materialize_grads=True)]


def assert_identical(module: nn.Module, model: nn.Module, inputs: list[Tensor]) -> None:
    """Check that values and gradients are the model's own, bit for bit."""
    found, expected = results(module, model, inputs), results(model, model, inputs)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_are_the_models_own_before_and_after(name):
    network = NETWORKS[name]
    model = network.build()
    inputs = network.inputs(5, seed=3)
    explainable = fxshap.make_explainable(model)
    before = state_of(model)
    random = torch.get_rng_state()

    assert_identical(explainable, model, inputs)
    explain(explainable, network.inputs(4, seed=1), network.inputs(2, seed=2))
    assert_identical(explainable, model, inputs)

    assert torch.equal(torch.get_rng_state(), random)
    assert_same_state(model, before)
    assert_no_shap_hooks(explainable)


@pytest.mark.parametrize(
    "name",
    ["gelu_reused", "residual_in_place", "two_inputs", "max_pool1d", "lstm_bidirectional_state"],
)
def test_gradient_explainer_gives_the_same(name):
    network = NETWORKS[name]
    model = network.build()
    background, samples = list(network.inputs(8, seed=1)), list(network.inputs(2, seed=2))
    explainable = fxshap.make_explainable(model, tuple(background))

    def gradients(module: nn.Module) -> list[np.ndarray]:
        explainer = shap.GradientExplainer(module, background)
        return as_list(explainer.shap_values(samples, nsamples=20, rseed=0))

    assert_same_values(gradients(explainable), gradients(model))


class Trainable(nn.Module):
    """Batch norm, dropout, a frozen layer, a counter, and attributes that SHAP would delete."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(10, 12).requires_grad_(False)
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.5)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        for module in self.children():
            module.x, module.y = "the user's x", "the user's y"

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.drop(self.act(self.norm(self.frozen(x)))))


def trainable() -> nn.Module:
    torch.manual_seed(0)
    model = Trainable()
    model(torch.randn(64, 10))
    return model.eval()


def train(module: nn.Module, model: nn.Module, steps: int = 3) -> list[Tensor]:
    """Train with dropout; return everything that has changed."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.1)
    losses = []
    module.train()
    for _ in range(steps):
        module.zero_grad()
        x, labels = torch.randn(16, 10), torch.randint(3, (16,))
        loss = F.cross_entropy(module(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    module.eval()
    return [*losses, *model.state_dict().values(), *(p.grad for p in model.head.parameters())]


@pytest.mark.parametrize("explained_first", [False, True])
def test_training_is_the_models_own(explained_first):
    model, original = trainable(), trainable()
    explainable = fxshap.make_explainable(model)
    if explained_first:
        explain(explainable, [torch.randn(5, 10)], [torch.randn(2, 10)])
        model.calls.copy_(original.calls)

    found, expected = train(explainable, model), train(original, original)

    assert all(map(torch.equal, found, expected))
    assert model.frozen.weight.grad is None


def test_modes_follow_the_explainable_model():
    model = trainable()
    explainable = fxshap.make_explainable(model)
    explainable.train()
    assert model.training and model.drop.training
    assert not torch.equal(explainable(torch.ones(1, 10)[:, :].repeat(2, 1)), torch.zeros(2, 3))
    explainable.eval()
    assert not model.training and not model.drop.training


def test_an_explanation_leaves_everything_as_it_was():
    model = trainable()
    F.cross_entropy(model(torch.randn(4, 10)), torch.tensor([0, 1, 2, 0])).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    values = {name: grad.clone() for name, grad in grads.items()}
    seen: list[Tensor] = []
    model.act.register_forward_hook(lambda module, args, output: seen.append(output))
    explainable = fxshap.make_explainable(model)
    before = state_of(model)

    explainer = shap.DeepExplainer(explainable, torch.randn(5, 10))  # a plain call, which counts
    calls = int(model.calls)
    explainer.shap_values(torch.randn(2, 10), check_additivity=False)

    assert int(model.calls) == calls
    before["tensors"]["calls"] = state_of(model)["tensors"]["calls"]
    assert_same_state(model, before)
    assert_no_shap_hooks(explainable)
    assert grads and all(
        model.get_parameter(name).grad is grad and torch.equal(grad, values[name])
        for name, grad in grads.items()
    )
    assert all(module.x == "the user's x" for module in model.children())
    explainable.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_random_numbers_are_as_without_an_explanation():
    network = NETWORKS["encoder_layer_batch_first_relu"]
    explainable = fxshap.make_explainable(network.build())
    background, samples = network.inputs(4, seed=1), network.inputs(2, seed=2)
    torch.manual_seed(5)
    np.random.seed(5)
    explain(explainable, background, samples)
    found = torch.randn(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(found[0], torch.randn(3))
    assert np.array_equal(found[1], np.random.rand(3))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)  # fmt: skip
def test_a_copy_explains_by_itself(duplicate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.GELU(), nn.Linear(8, 2))
    explainable = fxshap.make_explainable(model)
    background, samples = [torch.randn(5, 10)], [torch.randn(2, 10)]
    expected = explain(explainable, background, samples)

    duplicated = duplicate(explainable)

    assert duplicated.original_model is not model
    assert_same_values(explain(duplicated, background, samples), expected)
    nn.init.zeros_(model[0].weight)
    assert_same_values(explain(duplicated, background, samples), expected)


def test_gradients_reach_inputs_that_do_not_matter():
    class Ignores(nn.Module):
        def forward(self, x: Tensor, unused: Tensor) -> Tensor:
            return x.square()

    values = explain(
        fxshap.make_explainable(Ignores()),
        [torch.randn(4, 2), torch.randn(4, 3)],
        [torch.randn(2, 2), torch.randn(2, 3)],
    )
    assert np.abs(values[0]).max() > 0
    assert np.abs(values[1]).max() == 0
