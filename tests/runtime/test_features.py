"""Which elements of the inputs are one feature."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fxshap.errors import InputError, OptionError
from fxshap.runtime.features import differing_features, feature_numbers


def test_pixels_and_elements_are_features_by_default() -> None:
    image, row = torch.zeros(5, 3, 2, 2), torch.zeros(5, 3)
    numbers = feature_numbers([image, row])
    assert numbers[0].tolist() == [[[[0, 1], [2, 3]]]]
    assert numbers[1].tolist() == [[4, 5, 6]]


def test_a_mask_may_have_the_dimension_of_the_batch_or_not() -> None:
    x = torch.zeros(5, 3, 2)
    for shape in ((3, 1), (1, 3, 1)):
        mask = torch.tensor([9, 4, 9]).reshape(shape)
        assert feature_numbers([x], feature_mask=mask)[0].tolist() == [[[1], [0], [1]]]


@pytest.mark.parametrize("shape", [(2,), (5, 3), (1, 1, 1, 3), (3, 3)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="does not broadcast"):
        feature_numbers([torch.zeros(5, 3)], feature_mask=torch.zeros(shape, dtype=torch.long))


def test_a_mask_for_another_number_of_inputs_is_refused() -> None:
    with pytest.raises(OptionError, match="describes 2 inputs"):
        feature_numbers([torch.zeros(5, 3)], feature_mask=[torch.arange(3)] * 2)


def test_a_mask_may_be_an_array() -> None:
    segments = np.array([[7, 7], [2, 7]])
    for mask in (segments, [segments]):
        numbers = feature_numbers([torch.zeros(5, 3, 2, 2)], feature_mask=mask)
        assert numbers[0].tolist() == [[[[1, 1], [0, 1]]]]


@pytest.mark.parametrize("dims", [(0,), ()])
def test_dims_that_index_no_features_are_refused(dims: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="feature_dims"):
        feature_numbers([torch.zeros(5, 3)], feature_dims=dims)


def test_features_differ_if_any_element_does() -> None:
    x, r = torch.zeros(1, 2, 3), torch.zeros(2, 2, 3)
    r[0, 1, 2] = r[1, 0, 0] = 1.0
    by_row = feature_numbers([r], feature_dims=(1,))
    assert differing_features([x], [r], by_row).tolist() == [[False, True], [True, False]]
    mask = feature_numbers([r], feature_mask=torch.tensor([[0, 1, 1], [1, 1, 2]]))
    assert differing_features([x], [r], mask).tolist() == [
        [False, False, True],
        [True, False, False],
    ]
