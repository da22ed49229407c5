"""The operators that fxshap registers compute what their names say."""

import pytest
import torch

from fxshap.ops.library import BATCH_NORM, RELATIONS

ours = torch.ops.fxshap


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_step_is_the_comparison_with_zero_as_floats(relation):
    difference = torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64)
    expected = getattr(torch, relation)(difference, 0).double()
    assert torch.equal(ours.step(difference, relation), expected)


def test_select_is_where_for_a_condition_of_floats():
    a, b = torch.ones(3), torch.full((3,), 2.0)
    assert ours.select(torch.tensor([1.0, 0.0, 1.0]), a, b).tolist() == [1, 2, 1]


def test_ranks_name_the_element_of_each_rank():
    scores = torch.tensor([[0.1, 0.9, 0.5]])
    assert ours.ranks(scores, "topk", 0, 2).tolist() == [[[0, 1, 0], [0, 0, 1]]]
    assert ours.ranks(scores, "kth", 0, 1).tolist() == [[[1, 0, 0]]]


def test_a_negative_position_counts_from_the_end():
    positions = torch.tensor([1.0, -1.0])
    assert ours.one_hot_position(positions, 3).tolist() == [[0, 1, 0], [0, 0, 1]]


def test_batch_norm_has_a_shape_without_data():
    x, statistics = torch.empty(2, 3, device="meta"), torch.empty(3, device="meta")
    assert BATCH_NORM(x, None, None, statistics, statistics, 1e-5).shape == (2, 3)
