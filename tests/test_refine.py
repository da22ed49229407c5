"""Coalition refinement: additive, reproducible, and nearer to the exact Shapley values."""

from __future__ import annotations

from collections.abc import Sequence

import captum.attr
import numpy as np
import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from benchmarks.models import NETWORKS
from fxshap.refine import Refinement, draw_coalition
from fxshap.shapley import shapley_values

SOME = ("gelu_functional", "max_pool3d", "normalize", "gru_stacked_bidirectional", "two_inputs")


def explain(
    model: nn.Module, x: Sequence[Tensor], r: Sequence[Tensor], **options: object
) -> Tensor:
    """Return the attributions of all inputs, of shape (samples, features, outputs)."""
    explainable = fxshap.make_explainable(model, **options)  # type: ignore[arg-type]
    one = len(x) == 1
    explainer = shap.DeepExplainer(explainable, r[0] if one else list(r))
    values = explainer.shap_values(x[0] if one else list(x))
    pieces = [values] if one else values
    return torch.cat([torch.as_tensor(v).flatten(1, -2) for v in pieces], 1)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("pairs", [1, 3])
def test_refined_attributions_add_up(name: str, pairs: int) -> None:
    network = NETWORKS[name]
    model = network.build().double()
    x, r = (network.inputs(4, seed=s, dtype=torch.float64) for s in (1, 2))
    values = explain(model, x, r, refine=pairs)
    with torch.no_grad():
        f_x, f_r = model(*x), model(*r)
    scale = max(f_x.abs().max(), f_r.abs().max())
    assert (values.sum(1) - (f_x - f_r.mean(0))).abs().max() <= 1e-12 * scale


@pytest.mark.parametrize("name", SOME)
def test_refined_attributions_are_nearer_to_the_exact_values(name: str) -> None:
    network = NETWORKS[name]
    model = network.build().double()
    x, r = (network.inputs(8, seed=s, dtype=torch.float64) for s in (1, 2))
    flat = [torch.cat([t.flatten(1) for t in end], 1) for end in (x, r)]
    sizes = [t[0].numel() for t in x]

    def function(points: Tensor) -> Tensor:
        parts = points.split(sizes, 1)
        return model(*(p.reshape(-1, *t.shape[1:]) for p, t in zip(parts, x, strict=True)))

    exact = torch.stack(
        [torch.stack([shapley_values(function, a, b) for b in flat[1]]).mean(0) for a in flat[0]]
    )
    distances = [float((explain(model, x, r, refine=k) - exact).abs().sum()) for k in (0, 4)]
    assert distances[1] < 0.8 * distances[0]


def test_the_same_call_gives_the_same_bits_and_another_seed_others() -> None:
    network = NETWORKS["gelu_functional"]
    model = network.build()
    x, r = (network.inputs(3, seed=s) for s in (1, 2))
    first, again, other = (explain(model, x, r, refine=1, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_pairs_are_one_pass() -> None:
    network = NETWORKS["gelu_functional"]
    model = network.build()
    x, r = (network.inputs(3, seed=s) for s in (1, 2))
    assert torch.equal(explain(model, x, r), explain(model, x, r, refine=0, seed=5))


def test_coalitions_hold_half_of_the_features_that_differ() -> None:
    r, x = torch.zeros(6, 8), torch.ones(1, 8)
    x[:, :2] = 0.0
    (mask,) = draw_coalition([x], [r], [(1,)], torch.Generator().manual_seed(0))
    assert mask.sum(1).tolist() == [3] * 6
    assert not mask[:, :2].any()


def test_channels_of_a_pixel_switch_together() -> None:
    r, x = torch.zeros(2, 3, 4, 4), torch.ones(1, 3, 4, 4)
    ((mask,),) = Refinement(1).draw([x], [r])
    assert mask.shape == (2, 1, 4, 4)
    assert mask.flatten(1).sum(1).tolist() == [8, 8]
    ((tokens,),) = Refinement(1, feature_dims=(2,)).draw([x], [r])
    assert tokens.shape == (2, 1, 4, 1)


@pytest.mark.parametrize("dims", [(0,), (7,), ((1,), (1,))])
def test_wrong_feature_dims_are_refused(dims: tuple[object, ...]) -> None:
    with pytest.raises(fxshap.InputError, match="feature_dims"):
        Refinement(1, feature_dims=dims).draw([torch.ones(1, 4)], [torch.zeros(2, 4)])  # type: ignore[arg-type]


def test_a_negative_number_of_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="refine"):
        fxshap.make_explainable(nn.Linear(2, 2), refine=-1)


def test_one_pass_over_one_hidden_layer_is_integrated_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2)).double()
    x, r = torch.randn(3, 6).double(), torch.randn(1, 6).double()
    ours = explain(model, [x], [r])
    paths = captum.attr.IntegratedGradients(model)
    theirs = [paths.attribute(x, r, target=k, n_steps=100).detach().numpy() for k in range(2)]
    np.testing.assert_allclose(ours, np.stack(theirs, -1), atol=1e-12)
