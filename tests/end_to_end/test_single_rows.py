"""One reference, one sample, or both: the model is explained as it is among other rows."""

import captum.attr as ca
import pytest
import shap
import torch
from tangermeme.deep_lift_shap import deep_lift_shap
from torch import Tensor, nn

import fxshap
from tests.networks.reports.squeezing import REPORTS

LIMIT = 1e-5  # of the largest output, float32
ROWS = ((1, 1), (1, 2), (3, 1))
NAMES = [report.name for report in REPORTS]


def among_others(model: nn.Module, x: Tensor) -> Tensor:
    """The output of every row of a batch of two."""
    with torch.no_grad():
        return torch.stack([model(torch.stack([row, row]))[0].reshape(-1) for row in x])


def assert_sums(model: nn.Module, values: Tensor, x: Tensor, r: Tensor, column: int) -> None:
    y, expected = among_others(model, x)[:, column], among_others(model, r)[:, column].mean()
    limit = LIMIT * max(y.abs().max(), expected.abs(), torch.tensor(0.1))
    assert (values.detach().flatten(1).sum(1) - (y - expected)).abs().max() <= limit


@pytest.mark.parametrize("report", REPORTS, ids=NAMES)
def test_shap_explains_single_rows(report):
    model = report.build()
    explainable = fxshap.make_explainable(model)
    for references, samples in ROWS:
        (r,), (x,) = report.inputs(references, seed=1), report.inputs(samples, seed=2)
        explainer = shap.DeepExplainer(explainable, r)
        values = torch.from_numpy(explainer.shap_values(x))
        assert values.shape == (*x.shape, report.outputs)
        assert_sums(model, values[..., -1], x, r, report.outputs - 1)
        explainer = fxshap.DeepExplainer(explainable, r)
        assert_sums(model, torch.from_numpy(explainer.shap_values(x))[..., 0], x, r, 0)
    assert fxshap.verify(explainable, r[:1], x[:1]).additive


@pytest.mark.parametrize("report", REPORTS, ids=NAMES)
def test_captum_explains_single_rows(report):
    model = report.build()
    explainable = fxshap.make_explainable(model)
    for rows in (1, 2):
        (r,), (x,) = report.inputs(rows, seed=1), report.inputs(rows, seed=2)
        values, delta = ca.DeepLift(explainable).attribute(
            x, r, target=report.outputs - 1, return_convergence_delta=True
        )
        assert delta.abs().max() <= LIMIT * 10
        for i in range(rows):
            one = slice(i, i + 1)
            assert_sums(model, values[one], x[one], r[one], report.outputs - 1)


class Strands(nn.Module):
    """A network on sequences with one number for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean(-1)).squeeze()


@pytest.mark.parametrize("references, samples", ROWS)
def test_tangermeme_explains_single_rows(references, samples):
    model = Strands().eval()
    x = nn.functional.one_hot(torch.randint(0, 4, (samples, 6)), 4).transpose(1, 2).float()
    r = nn.functional.one_hot(torch.randint(0, 4, (references, 6)), 4).transpose(1, 2).float()
    values = deep_lift_shap(
        fxshap.make_explainable(model),
        x,
        references=r.expand(samples, *r.shape),
        target=0,
        device="cpu",
        raw_outputs=False,
        hypothetical=False,
    )
    assert_sums(model, values, x, r, 0)


def test_a_module_around_an_explainable_model_gets_what_the_model_returns():
    """A regression returns shape (rows,) to its caller; only libraries get one column."""

    class Column(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).unsqueeze(1)

    report = next(r for r in REPORTS if r.name == "squeezed_last")
    (r,), (x,) = report.inputs(3, seed=1), report.inputs(2, seed=2)
    explainable = fxshap.make_explainable(report.build())
    assert explainable(x).shape == (2,)
    outer = shap.DeepExplainer(Column(explainable), r).shap_values(x)
    inner = shap.DeepExplainer(explainable, r).shap_values(x)
    assert torch.equal(torch.from_numpy(outer), torch.from_numpy(inner))
