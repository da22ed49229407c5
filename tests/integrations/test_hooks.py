"""Hooks that failed calls of attribution libraries left behind are no request for multipliers."""

import copy
import io
from functools import partial

import captum.attr as captum
import pytest
import shap
import torch
from tangermeme.deep_lift_shap import deep_lift_shap
from torch import nn

import fxshap


class InPlace(nn.Module):
    """A model on which stock SHAP fails, leaving its hooks and parameters behind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(6, 2)

    def forward(self, x):
        return 30 * self.linear(self.relu(self.conv(x)).mean(2))


class Interrupted(nn.Module):
    """Raises the user's own error while `broken` and gradients are recorded."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv1d(4, 6, 3), nn.ReLU()
        self.pool, self.linear = nn.MaxPool1d(2), nn.Linear(6, 2)
        self.broken = False
        self.error = ValueError

    def forward(self, x):
        h = self.pool(self.relu(self.conv(x)))
        if self.broken and torch.is_grad_enabled():
            raise self.error("stopped")
        return 10 * self.linear(h.mean(2))


@pytest.fixture
def data():
    torch.manual_seed(0)
    letters = torch.randint(0, 4, (5, 12))
    rows = nn.functional.one_hot(letters, 4).float().transpose(1, 2)
    return rows[:4], rows[4:]


def hooks(model):
    return sum(
        len(getattr(module, table))
        for module in model.modules()
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    )


def explain(model, background, x):
    """Explain as SHAP's users do, with its check."""
    explainable = fxshap.make_explainable(model)
    return torch.tensor(shap.DeepExplainer(explainable, background).shap_values(x))


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def fail(model, background, x):
    """Let stock SHAP fail on the model itself."""
    with pytest.raises(RuntimeError, match="view and is being modified inplace"):
        shap.DeepExplainer(model, background).shap_values(x)
    assert hooks(model)


@pytest.mark.parametrize("same", [lambda model: model, copy.deepcopy, reloaded])
def test_after_stock_shap_failed_on_the_same_model(data, same):
    background, x = data
    model = InPlace().eval()
    keys = set(model.state_dict())
    right = explain(model, background, x)
    fail(model, background, x)
    model = same(model)
    torch.testing.assert_close(explain(model, background, x), right)
    assert right.abs().sum() > 1
    assert not hooks(model)
    assert set(model.state_dict()) == keys  # SHAP adds parameters `x` and `y`


def test_stock_shap_fails_after_the_model_was_made_explainable(data):
    background, x = data
    model = InPlace().eval()
    explainer = shap.DeepExplainer(fxshap.make_explainable(model), background)
    right = explainer.shap_values(x)
    fail(model, background, x)
    assert (explainer.shap_values(x) == right).all()


def test_verify_after_stock_shap_failed(data):
    model = InPlace().eval()
    fail(model, *data)
    assert fxshap.verify(model, *data).additive


def test_ordinary_gradients_after_stock_shap_failed(data):
    background, x = data
    model = InPlace().eval()
    plain = copy.deepcopy(model)
    fail(model, background, x)
    explainable = fxshap.make_explainable(model)
    rows, same_rows = (x.clone().requires_grad_() for _ in range(2))
    explainable(rows).sum().backward()
    plain(same_rows).sum().backward()
    assert torch.equal(rows.grad, same_rows.grad)


def test_embeddings_after_stock_shap_failed_on_ids():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    background, x = torch.randint(0, 9, (4, 3)), torch.randint(0, 9, (1, 3))
    with pytest.raises(RuntimeError):
        shap.DeepExplainer(model, background).shap_values(x)
    assert hooks(model)
    embed, head = fxshap.make_explainable(model).split_at("0")
    values = shap.DeepExplainer(head.bind(input=x), embed(background)).shap_values(embed(x))
    difference = (model(x) - model(background)).mean(0).detach().numpy()
    assert abs(values.sum((0, 1, 2)) - difference).max() < 1e-5


CALLS = {
    "shap": lambda m, r, x: shap.DeepExplainer(m, r).shap_values(x),
    "shap, a layer": lambda m, r, x: shap.DeepExplainer((m, m.relu), r).shap_values(x),
    "shap, gradients of a layer": lambda m, r, x: shap.GradientExplainer(
        (m, m.relu), r
    ).shap_values(x),
    "captum": lambda m, r, x: captum.DeepLift(m).attribute(x, r[:1], target=0),
    "captum, a layer": lambda m, r, x: captum.LayerDeepLift(m, m.relu).attribute(
        x, r[:1], target=0
    ),
    "tangermeme": lambda m, r, x: deep_lift_shap(m, x, references=r[None], device="cpu"),
}


def deep_lift(model, background, x):
    return captum.DeepLift(fxshap.make_explainable(model)).attribute(x, background[:1], target=0)


def of_layer(model, background, x):
    explainer = shap.DeepExplainer((fxshap.make_explainable(model), model.pool), background)
    return torch.tensor(explainer.shap_values(x))


def by_own_explainer(model, background, x):
    return torch.tensor(fxshap.DeepExplainer(model, background).shap_values(x))


def sequences(model, background, x):
    explainable = fxshap.make_explainable(model)
    return deep_lift_shap(explainable, x, references=background[None], device="cpu")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("explain_by", [explain, deep_lift, of_layer, sequences, by_own_explainer])
def test_after_any_call_was_interrupted(data, name, explain_by, error):
    model = Interrupted().eval()
    right = explain_by(model, *data)
    model.broken, model.error = True, error
    with pytest.raises(error):
        CALLS[name](model, *data)
    model.broken = False
    torch.testing.assert_close(explain_by(model, *data), right)
    assert right.abs().sum() > 0.1


def test_a_layer_explained_in_between_leaves_the_inputs_explained(data):
    background, x = data
    model = Interrupted().eval()
    explainable = fxshap.make_explainable(model)
    inputs = shap.DeepExplainer(explainable, background)
    right = inputs.shap_values(x)
    layer = shap.DeepExplainer((explainable, model.pool), background)
    layer.shap_values(x)
    assert (inputs.shap_values(x) == right).all()
    # A layer's explanation that is interrupted leaves SHAP's hook on the layer.
    model.pool.register_forward_hook(partial(shap.explainers._deep.deep_pytorch.get_target_input))
    assert (inputs.shap_values(x) == right).all()


def test_hooks_of_a_running_call_stay(data):
    """Stock SHAP explains a model that calls an explainable model of the same modules."""
    background, x = data
    model = Interrupted().eval()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
            self.inside = [fxshap.make_explainable(model)]  # no child

        def forward(self, rows):
            with torch.no_grad():
                self.inside[0](rows)
            return self.model(rows)

    both = Both().eval()
    right = shap.DeepExplainer(model, background).shap_values(x)
    values = shap.DeepExplainer(both, background).shap_values(x)
    assert abs(values - right).max() < 1e-6
