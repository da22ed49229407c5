"""The exact Shapley values, in every library, for all kinds of features."""

from __future__ import annotations

from collections.abc import Sequence

import captum.attr
import numpy as np
import pytest
import shap
import torch
from tangermeme.deep_lift_shap import deep_lift_shap
from torch import Tensor, nn

import fxshap
from fxshap.errors import OptionError
from fxshap.runtime.shapley import batches_of_coalitions, count_batches
from fxshap.verification.shapley import shapley_values
from tests.networks import NETWORKS

SOME = (
    "gelu_functional",
    "max_pool3d",
    "lstm_stacked_bidirectional",
    "two_inputs",
    "masked_fill",
    "winners_scattered",
    "sort_topk",
    "encoder_layer_time_first_gelu",
)


def brute_force(
    model: nn.Module, x: Sequence[Tensor], r: Sequence[Tensor], groups: Tensor | None = None
) -> np.ndarray:
    """Return the values of every sample, averaged over the references: (samples, features, k)."""
    sizes = [t[0].numel() for t in x]
    flat = [torch.cat([t.flatten(1) for t in end], 1) for end in (x, r)]

    def function(points: Tensor) -> Tensor:
        parts = zip(points.split(sizes, 1), x, strict=True)
        return model(*(part.reshape(-1, *t.shape[1:]) for part, t in parts))

    games = [[shapley_values(function, a, b, groups) for b in flat[1]] for a in flat[0]]
    return torch.stack([torch.stack(of_sample).mean(0) for of_sample in games]).numpy()


def with_shap(explainable: nn.Module, x: Sequence[Tensor], r: Sequence[Tensor]) -> np.ndarray:
    """Return the values of all elements, of shape (samples, elements, outputs)."""
    one = len(x) == 1
    explainer = shap.DeepExplainer(explainable, r[0] if one else list(r))
    values = explainer.shap_values(x[0] if one else list(x))
    return np.concatenate(
        [v.reshape(len(v), -1, v.shape[-1]) for v in ([values] if one else values)], 1
    )


def multilayer(features: int = 6, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(features, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs)
    ).double()


def points(samples: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SOME)
def test_every_network_has_its_exact_values(name: str) -> None:
    network = NETWORKS[name]
    model = network.build().double()
    x, r = (network.inputs(n, seed=n, dtype=torch.float64) for n in (2, 3))
    values = with_shap(fxshap.make_explainable(model, refine="exact"), x, r)
    exact = brute_force(model, x, r)
    assert np.abs(values - exact).max() < 1e-12 * max(1.0, np.abs(exact).max())


def test_all_libraries_and_the_batched_explainer_agree() -> None:
    model, x, r = multilayer(), points(2, 6), points(3, 6, seed=1)
    explainable = fxshap.make_explainable(model, refine="exact")
    exact = brute_force(model, [x], [r])
    batched = fxshap.DeepExplainer(explainable, r)
    assert np.abs(batched.shap_values(x) - exact).max() < 1e-12
    ranked, columns = batched.shap_values(x, ranked_outputs=1)
    assert np.abs(ranked - np.take_along_axis(exact, columns[:, None], 2)).max() < 1e-12
    method = captum.attr.DeepLiftShap(explainable)
    by_output = [method.attribute(x, r, target=k).detach().numpy() for k in range(3)]
    assert np.abs(np.stack(by_output, -1) - exact).max() < 1e-12
    one = captum.attr.DeepLift(explainable).attribute(x, r[:1], target=1).detach().numpy()
    assert np.abs(one - brute_force(model, [x], [r[:1]])[..., 1]).max() < 1e-12


def test_the_batched_explainer_is_exact_for_more_outputs_than_inputs() -> None:
    model, x, r = multilayer(3, 10), points(2, 3), points(3, 3, seed=1)
    exact = brute_force(model, [x], [r])
    for refine in ("exact", "auto"):
        values = fxshap.DeepExplainer(model, r, refine=refine).shap_values(x)
        assert np.abs(values - exact).max() < 1e-12


def test_positions_of_a_sequence_are_exact_in_tangermeme() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 1))
    bases = torch.eye(4)[torch.randint(4, (4, 8), generator=torch.Generator().manual_seed(1))].mT
    x, r = bases[:1].contiguous(), bases[1:]
    refinement = fxshap.Refinement("exact", feature_dims=(2,))
    explainable = fxshap.make_explainable(model, refine=refinement)
    values = deep_lift_shap(explainable, x, references=r[None], device="cpu", hypothetical=False)
    groups = torch.arange(8).expand(4, 8).flatten()
    exact = brute_force(model.double(), [x.double()], [r.double()], groups)[0, :, 0]
    assert np.abs(values.sum(1)[0].numpy() - exact).max() < 1e-6


def test_the_model_is_evaluated_once_for_all_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, r = multilayer(6, 10), points(2, 6), points(3, 6, seed=1)
    explainable = fxshap.make_explainable(model, r, refine="exact")
    program = explainable._calls.captures.latest.program
    rows, output = [], program.output
    monkeypatch.setattr(program, "output", lambda i: rows.append(len(i[0])) or output(i))
    shap.DeepExplainer(explainable, r).shap_values(x)
    assert sum(rows) == 2 * 3 * 2**6


def test_features_that_do_not_differ_leave_the_game(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, r = multilayer(30), points(1, 30), points(3, 30, seed=1)
    r[:, 4:] = x[:, 4:]
    r[1, 0] = x[0, 0]
    explainable = fxshap.make_explainable(model, r, refine="exact")
    program = explainable._calls.captures.latest.program
    rows, output = [], program.output
    monkeypatch.setattr(program, "output", lambda i: rows.append(len(i[0])) or output(i))
    values = with_shap(explainable, [x], [r])
    assert sum(rows) == 2**4 + 2**3 + 2**4
    groups = torch.arange(30).clamp(max=4)
    exact = brute_force(model, [x], [r], groups)
    assert np.abs(values[:, :4] - exact[:, :4]).max() < 1e-12
    assert not values[:, 4:].any()


def test_a_sample_that_is_its_own_reference_has_zeros() -> None:
    model, x = multilayer(), points(1, 6)
    values = with_shap(fxshap.make_explainable(model, refine="exact"), [x], [x])
    assert not values.any() and values.shape == (1, 6, 3)


def test_a_group_has_one_value_shared_by_squared_differences() -> None:
    model, x, r = multilayer(), points(2, 6), points(3, 6, seed=1)
    mask = torch.tensor([7, 7, 2, 2, 2, 9])  # any numbers, as in Captum
    refinement = fxshap.Refinement("exact", feature_mask=mask)
    values = with_shap(fxshap.make_explainable(model, refine=refinement), [x], [r])
    groups = torch.tensor([1, 1, 0, 0, 0, 2])
    by_group = np.stack([values[:, groups == k].sum(1) for k in range(3)], 1)
    assert np.abs(by_group - brute_force(model, [x], [r], groups)).max() < 1e-12
    one = with_shap(fxshap.make_explainable(model, refine=refinement), [x], [r[:1]])
    d = (x - r[:1])[:, :2].numpy()
    ratio = d[:, 0] ** 2 / d[:, 1] ** 2
    np.testing.assert_allclose(one[:, 0] / one[:, 1], ratio[:, None].repeat(3, 1), rtol=1e-9)


def test_patches_of_an_image_and_groups_across_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    x, r = points(1, 2, 4, 4), points(2, 2, 4, 4, seed=1)
    rows = torch.arange(4) // 2
    patches = rows[:, None] * 2 + rows  # (4, 4), for both channels
    refinement = fxshap.Refinement("exact", feature_mask=patches)
    values = with_shap(fxshap.make_explainable(model, refine=refinement), [x], [r])
    groups = patches.expand(2, 4, 4).flatten()
    by_patch = np.stack([values[:, groups == k].sum(1) for k in range(4)], 1)
    assert np.abs(by_patch - brute_force(model, [x], [r], groups)).max() < 1e-12

    network = NETWORKS["two_inputs"]
    both = network.build().double()
    x2, r2 = (network.inputs(n, seed=n, dtype=torch.float64) for n in (2, 3))
    masks = [torch.arange(a[0].numel()).reshape(a[:1].shape) for a in x2]
    refinement = fxshap.Refinement("exact", feature_mask=masks)
    values = with_shap(fxshap.make_explainable(both, refine=refinement), x2, r2)
    groups = torch.cat([mask.flatten() for mask in masks])
    by_group = np.stack([values[:, groups == k].sum(1) for k in range(int(groups.max()) + 1)], 1)
    assert np.abs(by_group - brute_force(both, x2, r2, groups)).max() < 1e-12


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e2])
def test_values_add_up_at_every_distance(size: float) -> None:
    model, r = multilayer(), points(3, 6, seed=1)
    x = r[:1] + size * points(1, 6)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        network, x_, r_ = model.to(dtype), x.to(dtype), r.to(dtype)
        values = with_shap(fxshap.make_explainable(network, refine="exact"), [x_], [r_])
        with torch.no_grad():
            f_x, f_r = network(x_), network(r_)
        scale = float(max(f_x.abs().max(), f_r.abs().max()))
        assert np.abs(values.sum(1) - (f_x - f_r.mean(0)).numpy()).max() <= limit * scale


def test_groups_of_tiny_and_huge_differences_are_finite() -> None:
    model, x, r = multilayer().float(), points(1, 6).float(), points(2, 6, seed=1).float()
    x[:, :3] = r[:1, :3] + torch.tensor([1e-30, 2e-25, 0.0])
    x[:, 3] = 1e25
    refinement = fxshap.Refinement("exact", feature_mask=torch.tensor([0, 0, 0, 1, 2, 2]))
    explainer = shap.DeepExplainer(fxshap.make_explainable(model, refine=refinement), r)
    values = explainer.shap_values(x, check_additivity=False)  # that check is not relative
    assert np.isfinite(values).all()


def test_layers_bound_arguments_and_fixed_rows() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(ids)).prod(1) * scale)

    torch.manual_seed(0)
    model = Bag().double()
    refinement = fxshap.Refinement("exact", feature_dims=(1,))
    embed, suffix = fxshap.make_explainable(model, refine=refinement).split_at("embedding")
    scale = torch.tensor([[3.0]], dtype=torch.float64)
    ids, padding = torch.tensor([[3, 1, 4, 0]]), torch.tensor([[0, 0, 0, 0]])
    x, r = embed(ids, scale), embed(padding, scale)
    values = with_shap(suffix.bind(ids=ids, scale=scale), [x], [r])
    rest = lambda t: model.head(torch.tanh(t.reshape(-1, 4, 4)).prod(1) * scale)  # noqa: E731
    exact = brute_force(rest, [x], [r], torch.arange(4).repeat_interleave(4))
    assert np.abs(values.reshape(1, 4, 4, 2).sum(2) - exact).max() < 1e-12
    assert not values.reshape(1, 4, 4, 2)[:, 3].any()


def test_too_many_groups_are_refused_with_the_cost() -> None:
    model, x, r = multilayer(20), points(1, 20), points(3, 20, seed=1)
    with pytest.raises(OptionError, match=r"20 differ.*3,145,728 rows and about .* for this"):
        with_shap(fxshap.make_explainable(model, refine="exact"), [x], [r])
    model, x, r = multilayer(2000), points(1, 2000), points(1, 2000, seed=1)
    with pytest.raises(OptionError, match=r"2000 differ.* more than 1e\+308 rows"):
        with_shap(fxshap.make_explainable(model, refine="exact"), [x], [r])
    values = with_shap(fxshap.make_explainable(model, refine="auto"), [x], [r])
    assert np.abs(values.sum(1) - (model(x) - model(r)).detach().numpy()).max() < 1e-12
    allowed = fxshap.Refinement("exact", max_groups=17)
    model, x, r = multilayer(17), points(1, 17), points(1, 17, seed=1)
    values = with_shap(fxshap.make_explainable(model, refine=allowed), [x], [r])
    assert np.abs(values - brute_force(model, [x], [r])).max() < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": "precise"}, "'exact' or 'auto', not 'precise'"),
        ({"refine": True}, "not True"),
        ({"refine": "exact", "rule": "variance"}, "rule has no effect with refine='exact'"),
        ({"refine": "exact", "compile": True}, "compile has no effect with refine='exact'"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fxshap.make_explainable(nn.Linear(2, 2), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coalitions": "exact", "seed": 1}, "seed has no effect"),
        ({"coalitions": 4, "budget": 1.0}, "budget has no effect without refine='auto'"),
        ({"coalitions": "auto", "budget": 0.0}, "budget is a number above 0, not 0.0"),
        ({"coalitions": "auto", "max_groups": 9}, "max_groups has no effect without"),
        ({"coalitions": 1, "feature_dims": torch.arange(3)}, "is feature_mask="),
        ({"coalitions": 1, "feature_dims": (1,), "feature_mask": torch.arange(3)}, "leave out"),
    ],
)
def test_refinements_that_mean_nothing_are_refused(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        fxshap.Refinement(**arguments)  # type: ignore[arg-type]


def test_batches_have_every_coalition_of_every_pair_once() -> None:
    players = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    players[4] = False
    for size in (1, 3, 8, 1000):
        batches = list(batches_of_coalitions(players, size))
        assert len(batches) == count_batches(players, size)
        seen = [0] * len(players)
        for pairs, ids, start, stop in batches:
            assert len(pairs) * (stop - start) <= max(size, 1)
            for pair, features in zip(pairs.tolist(), ids, strict=True):
                assert features.tolist() == players[pair].nonzero().flatten().tolist()
                seen[pair] += stop - start
        assert seen == [2 ** int(count) for count in players.sum(1)]
