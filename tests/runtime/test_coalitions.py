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
from fxshap.errors import OptionError
from fxshap.runtime.coalitions import (
    balanced_scores,
    blocks_of_chain,
    draw_blocks,
    draw_chains,
    share_together,
)
from fxshap.runtime.pairs import SampleReferencePairs
from fxshap.runtime.refinement import Refinement
from fxshap.verification.shapley import shapley_values
from tests.networks import NETWORKS

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
@pytest.mark.parametrize("pairs", [1, 16])
def test_refined_attributions_add_up(name: str, pairs: int) -> None:
    network = NETWORKS[name]
    model = network.build().double()
    x, r = (network.inputs(n, seed=n, dtype=torch.float64) for n in (2, 8))
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
    first, again, other = (
        explain(model, x, r, refine=fxshap.Refinement(1, seed=s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_pairs_are_one_pass() -> None:
    network = NETWORKS["gelu_functional"]
    model = network.build()
    x, r = (network.inputs(3, seed=s) for s in (1, 2))
    assert torch.equal(explain(model, x, r), explain(model, x, r, refine=fxshap.Refinement(0)))


@pytest.mark.parametrize("coalitions", [4, "auto", "exact"])
def test_a_linear_model_has_the_same_attributions(coalitions: object) -> None:
    model, x, r = nn.Linear(4, 2), torch.randn(2, 4), torch.randn(5, 4)
    expected = explain(model, [x], [r])
    assert torch.allclose(explain(model, [x], [r], refine=coalitions), expected, atol=1e-6)


def test_a_seed_without_coalitions_is_refused() -> None:
    with pytest.raises(OptionError, match="seed has no effect without coalitions"):
        fxshap.Refinement(0, seed=5)


def test_blocks_are_of_even_size_among_the_features_that_differ() -> None:
    differ = torch.ones(5, 8, dtype=torch.bool)
    differ[:, :2] = False
    for blocks, sizes in ((2, [3, 3]), (4, [2, 1, 2, 1])):
        scores = balanced_scores(8, blocks, np.random.default_rng(0))
        drawn = draw_blocks(differ, blocks, scores)
        assert bool((drawn[:, :2] == blocks - 1).all())
        for row in drawn[:, 2:]:
            assert sorted(torch.bincount(row, minlength=blocks).tolist()) == sorted(sizes)


def test_all_pairs_of_features_are_parted_equally_often() -> None:
    scores = balanced_scores(7, 2, np.random.default_rng(0))
    halves = torch.stack([torch.as_tensor(next(scores)) > 0 for _ in range(14)]).double()
    together = (halves.mT @ halves + (1 - halves).mT @ (1 - halves)).fill_diagonal_(0)
    assert together.unique().tolist() == [0, 6]  # of 14; 7.5 features is what a half would be


@pytest.mark.parametrize(("features", "blocks"), [(1, 2), (2, 2), (7, 2), (10, 4), (9, 9)])
def test_the_share_of_pairs_together_is_that_of_the_blocks(features: int, blocks: int) -> None:
    drawn = draw_blocks(
        torch.ones(1, features, dtype=torch.bool),
        blocks,
        balanced_scores(features, blocks, np.random.default_rng(0)),
    )
    (same,) = drawn.unsqueeze(1) == drawn.unsqueeze(2)
    pairs = features * (features - 1)
    expected = (float(same.sum()) - features) / pairs if pairs else 0.0
    assert float(share_together(torch.tensor([features]), blocks)) == pytest.approx(expected)


def test_chains_grow_with_the_number_of_passes() -> None:
    grown = [blocks_of_chain(pairs, 16, 10) for pairs in range(1, 2000)]
    assert grown == sorted(grown) and grown[0] == 2 and grown[-1] == 10
    assert blocks_of_chain(1000, 16, 1) == 2


def test_chains_that_switch_one_feature_at_a_time_in_all_orders_are_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x, r = torch.randn(1, 2).double(), torch.randn(1, 2).double()
    values = explain(model, [x], [r], refine=1)[0]
    assert (values - shapley_values(model, x[0], r[0])).abs().max() < 1e-12


def test_channels_of_a_pixel_switch_together() -> None:
    r, x = torch.zeros(2, 3, 4, 4), torch.ones(1, 3, 4, 4)
    chains = draw_chains(Refinement(1), [x], [r])
    ((block,),) = chains.drawn
    assert block.shape == (2, 1, 4, 4)
    assert block.flatten(1).sum(1).tolist() == [8, 8]
    ((tokens,),) = draw_chains(Refinement(1, feature_dims=(2,)), [x], [r]).drawn
    assert tokens.shape == (2, 1, 4, 1)


def test_references_in_chunks_get_the_same_values() -> None:
    network = NETWORKS["gelu_functional"]
    model = network.build().double()
    x, r = (network.inputs(n, seed=n, dtype=torch.float64) for n in (2, 20))
    whole, chunks = (explain(model, x, r, refine=8, reference_batch_size=n) for n in (20, 7))
    assert (whole - chunks).abs().max() < 1e-12


def test_coalitions_are_run_together_where_rows_lie_apart(monkeypatch) -> None:
    network = NETWORKS["encoder_layer_time_first_gelu"]
    model = network.build().double()
    x, r = (network.inputs(n, seed=n, dtype=torch.float64) for n in (1, 16))
    together = explain(model, x, r, refine=8)
    monkeypatch.setattr(
        SampleReferencePairs,
        "_tapped_batches",
        lambda self, points: [self.program.tapped(point)[1] for point in points],
    )
    assert (together - explain(model, x, r, refine=8)).abs().max() < 1e-12


@pytest.mark.parametrize("dims", [(0,), (7,), ((1,), (1,))])
def test_wrong_feature_dims_are_refused(dims: tuple[object, ...]) -> None:
    with pytest.raises(fxshap.InputError, match="feature_dims"):
        refinement = Refinement(1, feature_dims=dims)  # type: ignore[arg-type]
        draw_chains(refinement, [torch.ones(1, 4)], [torch.zeros(2, 4)])


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
