"""What enters a layer is explained as an input of the model would be."""

import re

import numpy as np
import pytest
import shap
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from fxshap.errors import BatchMixingError, InputError
from tests.helpers import (
    additivity_error,
    as_list,
    assert_no_shap_hooks,
    assert_same_state,
    explain,
    state_of,
)

EXACT = 1e-13


def data(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def built(model: nn.Module) -> nn.Module:
    """The model in float64, with weights that make it far from linear."""
    generator = torch.Generator().manual_seed(0)
    model.double().eval()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


class Block(nn.Module):
    """A hidden layer in a module of its own, between other modules."""

    def __init__(self, layer: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 6)
        self.layer = layer
        self.head = nn.Linear(width, 3)

    def first(self, x: Tensor) -> Tensor:
        return F.gelu(self.hidden(x))

    def rest(self, h: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(h)))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


class Rest(nn.Module):
    """What comes from a layer's input on, as a model of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model.rest(*inputs)


class InList(Block):
    """A layer that is one of a list."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]))

    def rest(self, h: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer[1](torch.sigmoid(self.layer[0](h)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        h = h.unflatten(1, (1, 6)) * torch.arange(1.0, 4.0, dtype=h.dtype)[:, None]
        return self.attention(h, h, h)[0].flatten(1)


LAYERS = {
    "leaf": lambda: Block(nn.GELU()),
    "leaf_in_place": lambda: Block(nn.ReLU(inplace=True)),
    "linear": lambda: Block(nn.Linear(6, 6)),
    "container": lambda: Block(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))),
    "containers_nested": lambda: Block(
        nn.Sequential(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)), nn.Softmax(1))
    ),
    "norm": lambda: Block(nn.LayerNorm(6)),
    "attention": lambda: Block(Attention(), 18),
}


def check(
    model: nn.Module, layer: nn.Module, backgrounds: list[Tensor], samples: list[Tensor],
    explainable: nn.Module | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """Explain a layer, check that nothing is left behind; return the values."""
    explainable = explainable or fxshap.make_explainable(model)
    before = state_of(model)
    values = explain((explainable, layer), backgrounds, samples)
    assert_no_shap_hooks(explainable)
    assert_same_state(model, before)
    assert not hasattr(layer, "target_input")
    return values


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_explained_as_a_model_that_begins_there(name):
    model = built(LAYERS[name]())
    explainable = fxshap.make_explainable(model)
    references, samples = data(7, 4, seed=1), data(3, 4, seed=2)

    values = check(model, explainable.layer, [references], [samples], explainable)

    with torch.no_grad():
        passing = [model.first(x) for x in (references, samples)]
    assert additivity_error(model, [references], [samples], values) <= EXACT
    (expected,) = explain(fxshap.make_explainable(Rest(model)), *[[x] for x in passing])
    np.testing.assert_allclose(values[0], expected, rtol=1e-12, atol=1e-13)


def test_a_layer_is_accepted_from_the_users_own_model():
    model = built(LAYERS["container"]())
    references, samples = data(7, 4, seed=1), data(3, 4, seed=2)
    through = fxshap.make_explainable(model).layer
    assert through is model.layer
    for layer in (model.layer, model.layer[1], model.head):
        values = check(model, layer, [references], [samples])
        assert additivity_error(model, [references], [samples], values) <= EXACT


def test_the_modules_of_a_list_and_the_model_itself_are_layers():
    model = built(InList())
    references, samples = data(7, 4, seed=1), data(3, 4, seed=2)
    explainable = fxshap.make_explainable(model)
    for layer in (explainable.layer[0], explainable.layer[1], model, explainable):
        values = check(model, layer, [references], [samples], explainable)
        assert additivity_error(model, [references], [samples], values) <= EXACT
    (expected,) = explain(explainable, [references], [samples])
    np.testing.assert_allclose(values[0], expected, rtol=1e-12, atol=1e-13)


def test_shaps_own_network_for_layers():
    """The network of SHAP's tests, with the layer that they explain."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_layers = nn.Sequential(
                nn.Conv2d(1, 10, kernel_size=5), nn.MaxPool2d(2), nn.ReLU(),
                nn.Conv2d(10, 20, kernel_size=5), nn.Dropout(), nn.MaxPool2d(2), nn.ReLU(),
            )  # fmt: skip
            self.fc_layers = nn.Sequential(
                nn.Linear(320, 50), nn.ReLU(), nn.Dropout(), nn.Linear(50, 10), nn.Softmax(dim=1)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.fc_layers(self.conv_layers(x).view(-1, 320))

    torch.manual_seed(0)
    model = Net().eval()
    explainable = fxshap.make_explainable(model)
    references, samples = torch.rand(4, 1, 28, 28), torch.rand(1, 1, 28, 28)
    values = check(model, explainable.conv_layers[0], [references], [samples], explainable)
    assert values[0].shape == (1, 1, 28, 28, 10)
    assert additivity_error(model, [references], [samples], values) <= 1e-6
    values = check(model, explainable.fc_layers[0], [references], [samples], explainable)
    assert values[0].shape == (1, 320, 10)
    assert additivity_error(model, [references], [samples], values) <= 1e-6


class Fusion(nn.Module):
    """A layer of two inputs, the second through a keyword, and others that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)
        self.fuse = Fuse()
        self.head = nn.Linear(6, 3)

    def rest(self, p: Tensor, q: Tensor) -> Tensor:
        return self.head(F.gelu(self.fuse(p, None, other=q, scale=1.5)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rest(self.a(x).sigmoid(), self.b(y).tanh())


class Fuse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(6))

    def forward(self, p: Tensor, mask: None, other: Tensor, scale: float) -> Tensor:
        return p * other * scale + self.shift


def test_a_layer_of_several_inputs():
    model = built(Fusion())
    references = [data(7, 4, seed=1), data(7, 3, seed=2)]
    samples = [data(3, 4, seed=3), data(3, 3, seed=4)]
    values = check(model, model.fuse, references, samples)
    assert [phi.shape for phi in values] == [(3, 6, 3), (3, 6, 3)]
    assert additivity_error(model, references, samples, values) <= EXACT
    with torch.no_grad():
        passing = [[model.a(x).sigmoid(), model.b(y).tanh()] for x, y in (references, samples)]
    for phi, expected in zip(values, explain(Rest_of(model), *passing), strict=True):
        np.testing.assert_allclose(phi, expected, rtol=1e-12, atol=1e-13)


def Rest_of(model: nn.Module) -> nn.Module:
    return fxshap.make_explainable(Rest(model))


def test_more_inputs_of_a_layer_than_of_the_model_are_rejected():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fuse = nn.Linear(4, 6), nn.Linear(4, 6), Fuse()

        def forward(self, x: Tensor) -> Tensor:
            return self.fuse(self.a(x), None, self.b(x), 1.0)

    model = built(Model())
    explainable = fxshap.make_explainable(model)
    with pytest.raises(InputError, match="2 tensors.*SHAP.*as many.*fxshap.DeepExplainer"):
        shap.DeepExplainer((explainable, model.fuse), data(7, 4))
    assert_no_shap_hooks(explainable)


def test_refined_values_of_a_layer_add_up_and_are_those_of_its_rest():
    model = built(LAYERS["attention"]())
    references, samples = data(7, 4, seed=1), data(2, 4, seed=2)
    explainable = fxshap.make_explainable(model, refine=fxshap.Refinement(2, seed=3))
    values = check(model, model.layer, [references], [samples], explainable)
    assert additivity_error(model, [references], [samples], values) <= EXACT
    with torch.no_grad():
        passing = [model.first(x) for x in (references, samples)]
    rest = fxshap.make_explainable(Rest(model), refine=fxshap.Refinement(2, seed=3))
    (expected,) = explain(rest, *[[x] for x in passing])
    np.testing.assert_allclose(values[0], expected, rtol=1e-12, atol=1e-13)


def test_one_explainable_model_answers_about_inputs_and_layers_in_turn():
    model = built(LAYERS["container"]())
    explainable = fxshap.make_explainable(model)
    references, samples = data(7, 4, seed=1), data(3, 4, seed=2)
    first = explain(explainable, [references], [samples])
    about = shap.DeepExplainer((explainable, model.layer), references)
    plain = shap.DeepExplainer(explainable, references)
    layer = about.shap_values(samples)
    np.testing.assert_array_equal(plain.shap_values(samples), first[0])
    np.testing.assert_array_equal(about.shap_values(samples), layer)
    model.head.weight.data.mul_(2)
    assert np.abs(about.shap_values(samples, check_additivity=False) / layer - 2).max() < 1e-9


# --- what cannot be asked -----------------------------------------------------------------------


def check_rejected(model: nn.Module, layer: nn.Module, message: str, error=InputError) -> None:
    """Check that a layer is rejected when the explainer is made, and nothing is left behind."""
    explainable = fxshap.make_explainable(model)
    before = state_of(model)
    with pytest.raises(error, match=message):
        shap.DeepExplainer((explainable, layer), data(7, 4))
    assert_no_shap_hooks(explainable)
    assert_same_state(model, before)
    values = explain(explainable, [data(7, 4)], [data(2, 4, seed=1)])
    assert additivity_error(model, [data(7, 4)], [data(2, 4, seed=1)], values) <= EXACT


def test_a_layer_called_twice_is_rejected_by_name():
    class Reuses(Block):
        def rest(self, h: Tensor) -> Tensor:
            return self.head(self.layer(self.hidden.weight.sum() * self.layer(h)))

    model = built(Reuses(nn.Softplus()))
    check_rejected(model, model.layer, r"the input of 'layer' cannot be explained.*2 times")


@pytest.mark.parametrize("which", ["list", "lent"])
def test_a_layer_never_called_is_rejected_by_name(which):
    model = built(InList() if which == "list" else LAYERS["attention"]())
    layer = model.layer if which == "list" else model.layer.attention.out_proj
    name = "layer" if which == "list" else "layer.attention.out_proj"
    check_rejected(model, layer, f"the input of '{re.escape(name)}' cannot be.*never calls")


def test_a_layer_without_the_rows_first_is_rejected_by_name():
    class TimeFirst(Block):
        def rest(self, h: Tensor) -> Tensor:
            h = self.layer(h.unflatten(1, (2, 3)).transpose(0, 1)).transpose(0, 1)
            return self.head(h.flatten(1))

    class Folded(Block):
        def rest(self, h: Tensor) -> Tensor:
            return self.head(self.layer(h.reshape(-1, 3)).reshape(-1, 6))

    for build in (TimeFirst, Folded):
        model = built(build(nn.Tanh()))
        check_rejected(model, model.layer, "'layer' cannot be.*shape is .*first dimension")


def test_a_layer_that_does_not_depend_on_the_input_is_rejected_by_name():
    class Fixed(Block):
        def rest(self, h: Tensor) -> Tensor:
            return self.head(h * self.layer(self.hidden.bias.expand(len(h), 6)))

    model = built(Fixed(nn.Tanh()))
    check_rejected(model, model.layer, "input of 'layer' cannot be.*does not depend on the model's")


def test_rows_that_influence_each_other_before_the_layer_are_rejected():
    class Mixes(Block):
        def first(self, x: Tensor) -> Tensor:
            return super().first(x).softmax(0)

    model = built(Mixes(nn.Tanh()))
    explainable = fxshap.make_explainable(model)
    with pytest.raises(BatchMixingError):
        shap.DeepExplainer((explainable, model.layer), data(7, 4))
    assert_no_shap_hooks(explainable)


def test_what_goes_around_a_layer_is_warned_of():
    class Around(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.head(self.layer(torch.sigmoid(h)) * h.exp())  # they meet here

    model = built(Around(nn.Tanh()))
    explainable = fxshap.make_explainable(model)
    references, samples = data(7, 4, seed=1), data(2, 4, seed=2)
    with pytest.warns(UserWarning, match="goes around the input of 'layer'.*# they meet here"):
        explainer = shap.DeepExplainer((explainable, model.layer), references)
    with pytest.raises(AssertionError, match="do not sum up"):  # SHAP's own check
        explainer.shap_values(samples)
    values = explainer.shap_values(samples, check_additivity=False)

    # What does go through the layer is explained, with the rest of a product at its mean.
    h_x, h_r = model.first(samples), model.first(references)
    change = torch.tanh(h_x.sigmoid())[:, None] - torch.tanh(h_r.sigmoid())
    mean = (h_x.exp()[:, None] + h_r.exp()) / 2
    expected = torch.einsum("nri,ki->nik", change * mean, model.head.weight) / len(references)
    np.testing.assert_allclose(values, expected.detach().numpy(), rtol=1e-12)


def test_a_residual_around_a_layer_is_part_of_its_input():
    """The tensor that enters is the one that is added, so nothing goes around it."""

    class Residual(Block):
        def rest(self, h: Tensor) -> Tensor:
            return self.head(h + self.layer(h))

    model = built(Residual(nn.Tanh()))
    references, samples = data(7, 4, seed=1), data(2, 4, seed=2)
    values = check(model, model.layer, [references], [samples])
    assert additivity_error(model, [references], [samples], values) <= EXACT


def test_attributes_of_the_model_are_reachable():
    model = built(LAYERS["container"]())
    model.note, model._private = "mine", "only mine"
    explainable = fxshap.make_explainable(model)
    assert explainable.note == "mine"
    assert explainable.head is model.head
    assert explainable.get_submodule("layer.0") is model.layer[0]
    assert not hasattr(explainable, "_private") and not hasattr(explainable, "nothing")
    with pytest.raises(AttributeError, match="'Block' object has no attribute 'nothing'"):
        _ = explainable.nothing
    assert list(as_list(explainable.first(data(2, 4)).shape)) == [2, 6]


class Gate(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(a) * b


class Gated(nn.Module):
    """A layer that takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Linear(4, 4), Gate(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(self.first(x), 2 * x))


def test_two_tensors_of_a_layer_are_refused_with_a_remedy_that_works():
    model, references, samples = built(Gated()), data(5, 4), data(2, 4, seed=1)
    explainable = fxshap.make_explainable(model)
    with pytest.raises(InputError, match=r"is 2 tensors, .*; use fxshap\.DeepExplainer, which"):
        shap.DeepExplainer((explainable, model.gate), references).shap_values(samples)
    values = fxshap.DeepExplainer((explainable, model.gate), references).shap_values(samples)
    change = (model(samples) - model(references).mean(0)).detach()
    total = sum(v.sum(1) for v in values)
    np.testing.assert_allclose(total, change, rtol=0, atol=EXACT * change.abs().max())
