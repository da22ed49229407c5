"""Products of many factors and determinants: Shapley values, also where the path overflows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.testing.rule_check import TOLERANCE
from fxshap.verification.shapley import shapley_values
from tests.rules.helpers import FLOATS, total_error

aten = torch.ops.aten


def test_determinant_gives_the_shapley_values_of_its_entries() -> None:
    r, x = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = shapley_values(
        lambda z: torch.linalg.det(z.reshape(-1, 3, 3)).unsqueeze(1), x, r
    ).squeeze(1)
    operation, _ = Operation.bind(aten.linalg_det.default, (r.reshape(1, 3, 3),), rows=(0, 0))
    endpoints = [r.reshape(1, 3, 3)], [x.reshape(1, 3, 3)]
    (found,) = apply_rule(operation, *endpoints, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(found.flatten() * (x - r), exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("size", [1e4, 1e30, 1e150])
@pytest.mark.parametrize("target", [aten.cumprod.default, aten.prod.dim_int], ids=str)
def test_products_of_many_pass_no_huge_intermediate_product(target, size, dim):
    """Of four factors, two are huge at the reference and the other two at the sample."""
    base = torch.tensor([[1.5, -2.0, 0.5, 3.0], [1.0, 1.0, 2.0, -1.0]]).double()
    r = torch.stack([base, base]).movedim(2, dim).contiguous()
    x = (r * 0.5 + 0.1).contiguous()
    r.movedim(dim, 2)[0, 0, :2] *= size
    x.movedim(dim, 2)[0, 0, 2:] *= size
    summed = target is aten.cumprod.default
    rows = (1, 1 if summed else 0) if dim == 0 else (0, 0)
    operation, _ = Operation.bind(target, (r, dim), rows=rows)
    endpoints = [operation(end) for end in (r, x)]
    (m,) = apply_rule(operation, [r], [x], torch.ones_like(endpoints[0]))
    parts, change, most = (
        m * (x - r),
        endpoints[1] - endpoints[0],
        torch.maximum(endpoints[0].abs(), endpoints[1].abs()),
    )
    if summed:
        change, most = change.sum(dim), most.sum(dim)
    assert ((parts.sum(dim) - change).abs() <= 1e-14 * most).all()
    assert (parts.abs().amax(dim) <= 1e4 * most.clamp(min=1)).all()


@FLOATS
def test_a_determinant_of_denormal_numbers_has_multipliers(dtype):
    """On the path, torch's derivative divides by pivots and overflows."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    r = torch.tensor([[0.0, 0.0, 0.4], [-0.4, -0.4, -0.4], [0.0, 3e-30, -0.4]], dtype=dtype)
    r[2, 0] = -4 * least
    r[0, 1] = 1000 * least
    x = r.clone()
    x[:, 1] = torch.tensor([0.4, -0.4, -0.4])
    for endpoints in ([r], [x]), ([x], [r]):
        for target in (aten.linalg_det.default, aten.det.default):
            (m,) = apply_rule(
                Operation.bind(target, endpoints[0])[0], *endpoints, torch.ones((), dtype=dtype)
            )
            assert m.isfinite().all()
            change = (torch.linalg.det(endpoints[1][0]) - torch.linalg.det(endpoints[0][0])).item()
            attributed = (m * (endpoints[1][0] - endpoints[0][0])).sum().item()
            assert attributed == pytest.approx(change, rel=10 * TOLERANCE[dtype])


def test_products_that_overflow_on_the_path_add_up():
    """From -7e34 to 0 past 3e39: parts that cancel were infinite and made the whole row NaN."""
    r, x = torch.tensor([-4.3e10, 1.6e24, 3.0]), torch.tensor([-0.0, 6.9e28, 3.0])
    assert total_error(aten.prod.dim_int, [r], [x], torch.ones(()), 0) < 1e-6
    (base_r, new_r), (base_x, new_x) = r.split([1, 2]), x.split([1, 2])
    for own in (True, False):

        def scattered(base: Tensor, new: Tensor, own: bool = own) -> Tensor:
            places = torch.zeros(len(new), dtype=torch.long)
            return aten.scatter_reduce.two(base, 0, places, new, "prod", include_self=own)

        endpoints = ([base_r, new_r], [base_x, new_x]) if own else ([base_r, r], [base_x, x])
        assert total_error(scattered, *endpoints, torch.ones(1)) < 1e-6
