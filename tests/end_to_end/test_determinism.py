"""The same call gives the same bits, with any number of threads."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fxshap
from tests.end_to_end.small_models import Image, Model, images, values
from tests.helpers import assert_same_values, explain


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("refine", [0, 2])
def test_the_same_call_gives_the_same_bits(model, threads, refine):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        explainable = fxshap.make_explainable(model, refine=refine)
        first = values(explainable)
        assert_same_values(values(explainable), first)
        assert_same_values(values(fxshap.make_explainable(Model(), refine=refine)), first)
        assert_same_values(values(copy.deepcopy(explainable)), first)
        assert_same_values(values(pickle.loads(pickle.dumps(explainable))), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_images_give_the_same_bits(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = Image()
        runs = [
            explain(fxshap.make_explainable(model), [images(40, 1)], [images(2, 2)])
            for _ in range(2)
        ]
        assert_same_values(*runs)
    finally:
        torch.set_num_threads(before)
