"""What users get where an explanation cannot be computed, and what an explainable model keeps."""

import captum.attr as ca
import numpy as np
import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from fxshap.errors import BatchMixingError, CaptureError, OutputError, RecognitionError

BACKGROUND, SAMPLES = torch.randn(5, 3), torch.randn(2, 3)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


# --- no gradient is recorded ----------------------------------------------------------------------


def with_shap(model: nn.Module) -> None:
    shap.DeepExplainer(model, BACKGROUND).shap_values(SAMPLES)


def with_captum(model: nn.Module) -> None:
    ca.DeepLift(model).attribute(SAMPLES, BACKGROUND[:2], target=0)


def with_fxshap(model: nn.Module) -> None:
    fxshap.DeepExplainer(model, BACKGROUND).shap_values(SAMPLES)


@pytest.mark.parametrize("explain", [with_shap, with_captum, with_fxshap])
def test_inference_mode_is_named(explain):
    model = fxshap.make_explainable(network())
    with (
        torch.inference_mode(),
        pytest.raises(RecognitionError, match=r"inside torch.inference_mode\(\).*leave `with"),
    ):
        explain(model)
    explain(model)


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.set_grad_enabled(False)])
def test_no_grad_is_named(context):
    model = fxshap.make_explainable(network())
    with context(), pytest.raises(RecognitionError, match=r"inside torch.no_grad\(\)"):
        with_shap(model)
    with context():  # they record the gradient themselves
        with_captum(model)
        with_fxshap(model)
    with_shap(model)


def test_tensors_that_inference_mode_made_are_explained():
    with torch.inference_mode():
        background, samples = BACKGROUND * 1, SAMPLES * 1
    model = fxshap.make_explainable(network())
    values = shap.DeepExplainer(model, background).shap_values(samples)
    expected = shap.DeepExplainer(model, BACKGROUND).shap_values(SAMPLES)
    np.testing.assert_array_equal(values, expected)


# --- models that cannot be explained --------------------------------------------------------------


class Ends(nn.Module):
    """A layer whose result goes through a function."""

    def __init__(self, end) -> None:
        super().__init__()
        self.layer, self.end = nn.Linear(3, 2), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.layer(x))


BAD = {
    "number": (lambda h: h * h.max().item(), CaptureError),
    "rows": (lambda h: h - h.mean(0), BatchMixingError),
    "random": (lambda h: h + torch.randn_like(h), CaptureError),
    "loss": (lambda h: h.sum(), OutputError),
    "third_dimension": (lambda h: h[:, None], OutputError),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_explained_fails_when_the_explainer_is_created(name, capfd):
    end, error = BAD[name]
    with pytest.raises(error):
        shap.DeepExplainer(fxshap.make_explainable(Ends(end)), BACKGROUND)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("end", [lambda h: h.argmax(1), lambda h: {"a": h}, lambda h: h.sum()])
def test_messages_show_real_shapes_and_types(end):
    """Not those of the tensors that torch.export traces with."""
    model = fxshap.make_explainable(Ends(end))
    with pytest.raises(OutputError) as raised:
        ca.DeepLift(model).attribute(SAMPLES, BACKGROUND[:2], target=0)
    assert "Fake" not in str(raised.value) and "(s" not in str(raised.value)


def test_the_advice_for_three_dimensions_works():
    model = Ends(lambda h: h[:, None].expand(-1, 2, -1))
    with pytest.raises(OutputError, match=r"output=lambda y: y.flatten\(1\)"):
        shap.DeepExplainer(fxshap.make_explainable(model), BACKGROUND)
    flat = fxshap.make_explainable(model, output=lambda y: y.flatten(1))
    assert shap.DeepExplainer(flat, BACKGROUND).shap_values(SAMPLES).shape == (2, 3, 4)


def test_a_bag_is_named_and_the_advice_works():
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.amax(0, keepdim=True))

    with pytest.raises(OutputError, match=r"returns 1 rows for inputs of 5.*unbatched=True"):
        shap.DeepExplainer(fxshap.make_explainable(Bag()), BACKGROUND)
    bags = fxshap.make_explainable(Bag(), unbatched=True)
    values = shap.DeepExplainer(bags, torch.randn(4, 5, 3)).shap_values(torch.randn(2, 5, 3))
    assert values.shape == (2, 5, 3, 2)


class LongLine(nn.Module):
    """A condition in a line of 99 characters."""

    def forward(self, x: Tensor) -> Tensor:
        if (x.sum() > 0).item() and (x.mean() > 0).item() and (x.amax() > 0).item() and x.numel():
            return x
        return -x


def test_long_lines_are_cut():
    with pytest.raises(CaptureError, match=r"\(`if \(x.sum\(\) > 0\).{50,70} \.\.\.`\)"):
        fxshap.make_explainable(LongLine(), BACKGROUND)


# --- token ids -----------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A sum of embeddings; padding may be masked by the ids themselves."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.embedding, self.head, self.masked = nn.Embedding(9, 4), nn.Linear(4, 2), masked

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.relu(self.embedding(ids))
        return self.head((h * (ids > 0)[..., None] if self.masked else h).sum(1))


@pytest.mark.parametrize("rows", [1, 2])
def test_captum_explains_an_embedding_from_ids(rows):
    model = Tokens(masked=False).eval()
    ids, padding = torch.tensor([[3, 1, 4], [1, 5, 2]])[:rows], torch.zeros(rows, 3).long()
    layer = ca.LayerDeepLift(fxshap.make_explainable(model), model.embedding)
    values, delta = layer.attribute(ids, padding, target=1, return_convergence_delta=True)
    assert values.shape == (rows, 3, 4) and delta.abs().max() < 1e-5


def test_ids_that_go_around_the_embedding_are_warned_about():
    model = Tokens(masked=True).eval()
    layer = ca.LayerDeepLift(fxshap.make_explainable(model), model.embedding)
    with pytest.warns(UserWarning, match="goes around the output of 'embedding'"):
        layer.attribute(torch.tensor([[3, 1, 4]]), torch.zeros(1, 3).long(), target=1)


# --- states --------------------------------------------------------------------------------------


class Around(nn.Module):
    """A module with a model inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("around", [lambda model: model, Around], ids=["itself", "a child"])
def test_states_have_the_names_of_the_model_and_load_both_ways(around):
    plain, explainable = around(network()), around(fxshap.make_explainable(network()))
    state = explainable.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all("_isolated" not in name for name in state)
    plain.load_state_dict(state)
    for a, b in zip(plain.state_dict().values(), state.values(), strict=True):
        assert torch.equal(a, b)
    other = around(network()).state_dict()
    explainable.load_state_dict(other)
    for a, b in zip(explainable.state_dict().values(), other.values(), strict=True):
        assert torch.equal(a, b)


def test_a_missing_weight_has_its_own_name():
    explainable = fxshap.make_explainable(network())
    state = explainable.state_dict()
    del state["2.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "2.bias"'):
        explainable.load_state_dict(state)
