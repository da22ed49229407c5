"""The brute-force Shapley values, on games whose values are known."""

import torch

from fxshap.runtime.shapley import coalitions, shapley_weights
from fxshap.verification.shapley import shapley_values

ONES = torch.ones(10, dtype=torch.float64)
ZEROS = torch.zeros(10, dtype=torch.float64)


def random_points(features: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, r = torch.randn(2, features, generator=generator, dtype=torch.float64)
    return x, r


def random_network(x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(10, 16, generator=generator, dtype=torch.float64)
    second = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    return torch.relu(x @ first).square() @ second


def test_coalitions_are_all_subsets() -> None:
    subsets = {tuple(row) for row in coalitions(4).tolist()}
    assert len(subsets) == 16


def test_weights_of_every_player_average_its_marginal_contributions() -> None:
    weights = shapley_weights(coalitions(10))
    torch.testing.assert_close(weights.clamp(min=0).sum(1), ONES)
    torch.testing.assert_close(weights.clamp(max=0).sum(1), -ONES)


def test_glove_game() -> None:
    """Players 0 and 1 hold a left glove each, player 2 a right one; a pair is worth 1."""

    def pairs(x: torch.Tensor) -> torch.Tensor:
        return torch.minimum(x[:, :2].sum(1), x[:, 2]).unsqueeze(1)

    values = shapley_values(pairs, ONES[:3], ZEROS[:3]).squeeze(1)
    torch.testing.assert_close(values, torch.tensor([1 / 6, 1 / 6, 4 / 6], dtype=torch.float64))


def test_linear_function_gives_its_terms() -> None:
    x, r = random_points()
    weight = torch.linspace(-2, 3, 20, dtype=torch.float64).view(10, 2)
    values = shapley_values(lambda z: z @ weight + 1, x, r)
    torch.testing.assert_close(values, weight * (x - r).unsqueeze(1))


def test_product_of_two_is_the_difference_times_the_midpoint() -> None:
    x, r = random_points(2)
    values = shapley_values(lambda z: z[:, :1] * z[:, 1:], x, r).squeeze(1)
    midpoint = (x + r) / 2
    torch.testing.assert_close(values, (x - r) * midpoint.flip(0))


def test_maximum_of_equals_is_shared_equally() -> None:
    values = shapley_values(lambda z: z.amax(1, keepdim=True), ONES, ZEROS).squeeze(1)
    torch.testing.assert_close(values, ONES / 10)


def test_efficiency() -> None:
    x, r = random_points()
    difference = random_network(x[None]) - random_network(r[None])
    values = shapley_values(random_network, x, r)
    torch.testing.assert_close(values.sum(0, keepdim=True), difference)


def test_feature_that_changes_nothing_gets_nothing() -> None:
    x, r = random_points()
    r[3] = x[3]
    assert shapley_values(random_network, x, r)[3].abs().max() < 1e-12


def test_groups_play_as_one() -> None:
    """Two features in one group get, together, what the group's game gives it."""
    x, r = random_points(4)
    groups = torch.tensor([0, 1, 1, 2])

    def function(z: torch.Tensor) -> torch.Tensor:
        return torch.stack([z[:, 0] * z[:, 1] * z[:, 2], z[:, 2].square() + z[:, 3]], 1)

    values = shapley_values(function, x, r, groups, batch_size=3)
    pair = x[1] * x[2] - r[1] * r[2], (x[1] * x[2] + r[1] * r[2]) / 2
    expected = [
        [(x[0] - r[0]) * pair[1], 0.0],
        [pair[0] * (x[0] + r[0]) / 2, x[2] ** 2 - r[2] ** 2],
        [0.0, x[3] - r[3]],
    ]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
