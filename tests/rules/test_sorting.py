"""Order statistics: exact Shapley values."""

from __future__ import annotations

import pytest
import torch

from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.verification.shapley import shapley_values

aten = torch.ops.aten


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("target", "constants", "value"),
    [
        (aten.sort.default, (1,), lambda s: s.sort(1).values),
        (aten.sort.default, (1, True), lambda s: s.sort(1, descending=True).values),
        (aten.topk.default, (2, 1), lambda s: s.topk(2, 1).values),
        (aten.topk.default, (2, 1, False), lambda s: s.topk(2, 1, False).values),
        (aten.kthvalue.default, (4, 1), lambda s: s.kthvalue(4, 1, True).values),
        (aten.median.dim, (1,), lambda s: s.median(1, True).values),
    ],
    ids=["sort", "descending", "topk", "smallest", "kthvalue", "median"],
)
def test_order_statistics_have_their_exact_shapley_values(target, constants, value, ties):
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        r, x = torch.randn(2, 1, 6, generator=generator, dtype=torch.float64)
        if ties:
            r, x = (2 * r).round(), (2 * x).round()
        operation, _ = Operation.bind(target, (r, *constants))
        grad = torch.randn(value(r).shape, generator=generator, dtype=torch.float64)
        outputs = operation(r)
        (multiplier,) = apply_rule(operation, (r,), (x,), (grad.reshape(outputs[0].shape), None))
        exact = shapley_values(lambda s, grad=grad: (value(s) * grad).sum(1, True), x[0], r[0])
        torch.testing.assert_close((multiplier * (x - r))[0], exact[:, 0], rtol=0, atol=1e-12)
        assert (multiplier.abs() <= grad.abs().sum() + 1e-12).all()
