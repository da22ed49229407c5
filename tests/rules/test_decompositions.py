"""Every decomposition returns what its operator returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxshap.rules.core.registry import DECOMPOSITIONS
from fxshap.testing.rule_check import ROWS, Case
from tests.rules.cases import ALL
from tests.rules.cases.base import constant, v

aten = torch.ops.aten


def cell(gates: int) -> list[Tensor]:
    """Return weights and biases of a recurrent cell with 4 units and 3 features."""
    return [constant(gates, 3), constant(gates, 4), constant(gates), constant(gates)]


INDEX = torch.arange(3 * ROWS).reshape(ROWS, 3) * 5 % 4

DECOMPOSED = [
    (aten.glu.default, (v(6),), {}),
    (aten.cosine_similarity.default, (v(5), v(5)), {}),
    (aten.hinge_embedding_loss.default, (v(5), v(5), 0.5, 2), {}),
    (aten.hinge_embedding_loss.default, (v(3), torch.tensor([1.0, -1.0, 0.5]), 1.0, 0), {}),
    (aten.cdist.default, (v(3, 4), v(2, 4), 1.0, None), {}),
    (aten._cdist_forward.default, (v(3, 4), v(2, 4), 2.0, None), {}),
    (aten.addcdiv.default, (v(5), v(5), v(5, low=0.5)), {"value": 0.3}),
    (aten.broadcast_tensors.default, ([v(5), v(1)],), {}),
    (aten.logaddexp.default, (v(5), v(5)), {}),
    (aten.argsort.default, (v(5), 1, True), {}),
    (aten.argsort.stable, (v(5),), {"stable": True, "dim": 1}),
    (aten.floor_divide.default, (v(5), v(5, low=0.5)), {}),
    (aten.scaled_dot_product_attention.default, (v(2, 3, 4), v(2, 5, 4), v(2, 5, 4)), {}),
    (aten.scaled_dot_product_attention.default, (v(2, 4, 4), v(2, 4, 4), v(2, 4, 4)),
     {"is_causal": True, "scale": 0.3}),
    (aten.scaled_dot_product_attention.default, (v(4, 3, 4), v(2, 3, 4), v(2, 3, 4)),
     {"enable_gqa": True, "attn_mask": torch.eye(3, dtype=torch.bool)}),
    (aten.scatter.reduce, (v(4), 1, INDEX, v(3)), {"reduce": "add"}),
    (aten.scatter.reduce, (v(4), 1, INDEX, v(3)), {"reduce": "multiply"}),
    (aten.lstm_cell.default, (v(3), [v(4), v(4)], *cell(16)), {}),
    (aten.lstm_cell.default, (v(3), [v(4), v(4)], *cell(16)[:2]), {}),
    (aten.gru_cell.default, (v(3), v(4), *cell(12)), {}),
    (aten.rnn_tanh_cell.default, (v(3), v(4), *cell(4)), {}),
    (aten.rnn_relu_cell.default, (v(3), v(4), *cell(4)[:2]), {}),
]  # fmt: skip


EMBEDDING_BAGS = [aten.embedding_bag.default, aten.embedding_bag.padding_idx]


def test_every_decomposition_has_a_case() -> None:
    others = {case.target for case in ALL if case.decomposition is not None}
    assert {target for target, _, _ in DECOMPOSED} | {*others, *EMBEDDING_BAGS} == set(
        DECOMPOSITIONS
    )


@pytest.mark.parametrize(
    ("target", "args", "kwargs"), DECOMPOSED, ids=[str(target) for target, _, _ in DECOMPOSED]
)
def test_decompositions_return_what_the_operation_returns(
    target: Any, args: Any, kwargs: Any
) -> None:
    operation, r, _ = Case(target, args, kwargs).draw(torch.float64)
    decomposed = replace(operation, target=DECOMPOSITIONS[target])
    torch.testing.assert_close(decomposed(*r), operation(*r))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
def test_embedding_bags_return_what_the_operation_returns(
    mode: str, padding: int | None, last: bool
) -> None:
    """Bags of several sizes; one is empty and one has only padding."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 3, generator=generator)
    indices = torch.tensor([0, 2, 4, 4, 2, 2, 1, 3])
    offsets = torch.tensor([0, 3, 3, 4, 6, 8] if last else [0, 3, 3, 4, 6])
    weights = torch.randn(8, generator=generator) if mode == "weighted" else None
    number = {"sum": 0, "mean": 1, "max": 2, "weighted": 0}[mode]
    args = (table, indices, offsets, False, number, False, weights, last, padding)
    for target in EMBEDDING_BAGS if padding is None else EMBEDDING_BAGS[1:]:
        arguments = args if target is EMBEDDING_BAGS[1] else args[:-1]
        torch.testing.assert_close(DECOMPOSITIONS[target](*arguments)[0], target(*arguments)[0])


@pytest.mark.parametrize("reduce", ["sum", "mean", "prod", "amax", "amin"])
@pytest.mark.parametrize("include_self", [True, False])
def test_scatter_reduce_with_a_smaller_index(reduce: str, include_self: bool) -> None:
    """The index may be smaller than both tensors in every dimension."""
    generator = torch.Generator().manual_seed(0)
    base, source = (torch.randn(n, 4, 3, generator=generator) for n in (5, 7))
    index = torch.tensor([[[4, 0], [2, 1], [0, 0]], [[2, 2], [2, 0], [4, 1]]])
    arguments = (base, 0, index, source, reduce)
    found = DECOMPOSITIONS[aten.scatter_reduce.two](*arguments, include_self=include_self)
    torch.testing.assert_close(
        found, base.scatter_reduce(*arguments[1:], include_self=include_self)
    )


def test_angles_of_complex_and_of_real_numbers() -> None:
    z = torch.randn(20, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    for value in (z, z.real):
        torch.testing.assert_close(DECOMPOSITIONS[aten.angle.default](value), torch.angle(value))
