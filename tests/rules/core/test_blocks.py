"""Functions that are computed in blocks."""

from __future__ import annotations

from contextvars import ContextVar

import pytest
import torch
from torch import Tensor

from fxshap.rules.core import blocks
from fxshap.rules.core.blocks import in_blocks, smallest_blocks
from fxshap.rules.core.tracing import tracing_rules

SHAPES = [
    ((7, 4), (7, 4)), ((7, 4), (1, 4)), ((1, 4), (7, 1)), ((7, 4), (4,)), ((7, 4), ()),
    ((3, 1, 4), (7, 4)), ((4,), (4,)), ((), ()), ((0, 4), (1, 4)), ((7, 4), (7, 1)),
]  # fmt: skip


@pytest.mark.parametrize("elements", [1, 9, 12, 2**18])
@pytest.mark.parametrize(("first", "second"), SHAPES, ids=str)
def test_blocks_of_broadcast_values(
    first: tuple[int, ...], second: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", ContextVar("elements", default=elements))
    a, b = torch.randn(first), torch.randn(second)
    largest = []

    def divide(a: Tensor, b: Tensor) -> Tensor:
        largest.append((a + b).numel())
        return a.div(b)

    assert torch.equal(in_blocks(divide, a, b), a / b)
    whole = (a + b).numel()
    row = whole // max(len(a + b), 1) if (a + b).dim() else 1
    assert max(largest, default=0) <= max(elements, row)
    less = in_blocks(torch.lt, a, b, dtype=torch.bool)
    assert less.dtype == torch.bool and torch.equal(less, a < b)


def test_traced_rules_compute_all_at_once() -> None:
    sizes = []
    with smallest_blocks(), tracing_rules():
        in_blocks(lambda a: sizes.append(len(a)) or a, torch.randn(5, 2))
    assert sizes == [5]
