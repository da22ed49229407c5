"""Functions of two or three arguments: exact Shapley values, without huge intermediate values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.verification.shapley import shapley_values
from tests.rules.helpers import (
    FLOATS,
    assert_shapley_values_of_two,
    attributions_and_change,
    endpoints,
    multipliers,
)

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "function"),
    [
        (aten.atan2.default, lambda z: torch.atan2(z[:, :1], z[:, 1:])),
        (aten.pow.Tensor_Tensor, lambda z: z[:, :1] ** z[:, 1:]),
        (aten.xlogy.Tensor, lambda z: torch.xlogy(z[:, :1], z[:, 1:])),
    ],
    ids=["atan2", "pow", "xlogy"],
)
def test_two_arguments_have_the_shapley_values_of_two_players(target: Any, function: Any) -> None:
    assert_shapley_values_of_two(target, function)


def test_three_arguments_have_the_shapley_values_of_three_players() -> None:
    r, x = torch.tensor([[0.2, -0.5, 0.3], [2.0, 0.5, 1.0]], dtype=torch.float64)
    exact = shapley_values(lambda z: z[:, :1].clamp(z[:, 1:2], z[:, 2:]), x, r).squeeze(1)
    found = multipliers(aten.clamp.Tensor, tuple(r.split(1)), tuple(x.split(1)))
    torch.testing.assert_close(torch.cat(found) * (x - r), exact, rtol=1e-14, atol=1e-15)


def test_a_coalition_outside_the_domain_gives_equal_parts() -> None:
    """From (-2)^2 to 3^0.5 one coalition is (-2)^0.5, which is NaN."""
    r, x = (torch.tensor(end, dtype=torch.float64) for end in ([-2.0, 2.0], [3.0, 0.5]))
    found = multipliers(aten.pow.Tensor_Tensor, tuple(r.split(1)), tuple(x.split(1)))
    half = (3**0.5 - 4) / 2
    torch.testing.assert_close(torch.cat(found) * (x - r), torch.tensor([half, half]).to(r))


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["bilinear", "nearest", "bicubic"])
def test_coordinates_of_a_sampled_point_have_the_shapley_values_of_two_players(mode: int) -> None:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)
    r, x = torch.rand(2, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.8
    weights = torch.tensor([1.0, -0.4], dtype=torch.float64).reshape(1, 2, 1, 1)

    def sampled(z: torch.Tensor) -> torch.Tensor:
        images = image.expand(len(z), *image.shape[1:])
        out = aten.grid_sampler.default(images, z.reshape(-1, 1, 1, 2), mode, 0, False)
        return (out * weights).sum((1, 2, 3)).unsqueeze(1)

    exact = shapley_values(sampled, x, r).squeeze(1)
    points = r.reshape(1, 1, 1, 2)
    operation, _ = Operation.bind(
        aten.grid_sampler.default, (image, points, mode, 0, False), slots=(1,), rows=(0, 0)
    )
    (found,) = apply_rule(operation, [points], [x.reshape(1, 1, 1, 2)], weights)
    torch.testing.assert_close(found.flatten() * (x - r), exact, rtol=1e-12, atol=1e-13)


@FLOATS
def test_copysign_attributes_its_jump_to_the_argument_of_the_sign(dtype):
    """A jump that both arguments shared magnified the rounding error of the other to 1e12."""
    a, b = torch.tensor([0.25], dtype=dtype), torch.tensor([0.0], dtype=dtype)
    pairs = [a, b], [a + 0.125, b - 1e-15]
    attributions, change = attributions_and_change(aten.copysign.Tensor, *pairs)
    assert sum(attributions) == pytest.approx(change, rel=4 * torch.finfo(dtype).eps)
    assert attributions[0] == 0 and attributions[1] == pytest.approx(-0.625)


@pytest.mark.parametrize("swapped", [False, True])
def test_quotients_and_powers_pass_no_huge_intermediate_value(swapped):
    """From 1e10 / 1e10 to 0.5 / 1.5 past 1e10 / 1.5, half of which cancelled."""
    cases = (
        (aten.div.Tensor_mode, ((-1e10, 4.0), (1e10, 1.5)), {"rounding_mode": "floor"}),
        (aten.pow.Tensor_Tensor, ((1e30, 2.0), (0.1, 3.0)), {}),
    )
    for target, pairs, options in cases:
        r, x = endpoints(*(end[::-1] if swapped else end for end in pairs))
        operation, _ = Operation.bind(target, r, options, slots=(0, 1))
        found = apply_rule(operation, r, x, torch.ones_like(r[0]))
        attributions = [(m * (b - a)).item() for m, a, b in zip(found, r, x, strict=True)]
        y_r, y_x = operation(*r).item(), operation(*x).item()
        assert sum(attributions) == pytest.approx(y_x - y_r, rel=1e-12)
        assert max(map(abs, attributions)) <= 2 * max(abs(y_r), abs(y_x)) + 1


def test_a_huge_pixel_at_mixed_coordinates_adds_nothing():
    """The pixel is at the row of one endpoint and the column of the other."""
    image = torch.tensor([[[[1.0, 1e30], [1e30, 2.0]]]], dtype=torch.float64)
    r, x = (torch.full((1, 1, 1, 2), at, dtype=torch.float64) for at in (-1.0, 1.0))
    operation, _ = Operation.bind(aten.grid_sampler_2d.default, (image, r, 0, 0, True), slots=(1,))
    (m,) = apply_rule(operation, [r], [x], torch.ones(1, 1, 1, 1, dtype=torch.float64))
    assert (m * (x - r)).flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("swapped", [False, True])
def test_an_image_that_is_huge_at_the_other_points_changes_in_one_order(swapped):
    """The image of one endpoint is huge at the point of the other."""
    image = torch.tensor([[[[1.0, 1e30], [3.0, 1e30]], [[2.0, 5.0], [4.0, 6.0]]]]).double()
    other = torch.tensor([[[[9.0, 2.0], [2.0, 3.0]], [[7.0, 8.0], [8.0, 7.0]]]]).double()
    points = [torch.tensor([[[at]]], dtype=torch.float64) for at in ([-1.0, -1.0], [1.0, 0.5])]
    r, x = [image, points[0]], [other, points[1]]
    r, x = (x, r) if swapped else (r, x)
    operation, _ = Operation.bind(aten.grid_sampler_2d.default, (*r, 0, 0, True), slots=(0, 1))
    y_r, y_x = operation(*r), operation(*x)
    g = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    found = apply_rule(operation, r, x, g)
    attributed = sum((m * (b - a)).sum() for m, a, b in zip(found, r, x, strict=True))
    assert attributed.item() == pytest.approx((g * (y_x - y_r)).sum().item(), rel=1e-12)
