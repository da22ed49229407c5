"""Models on a GPU: additive there too, beside what the processor gives; skipped without one."""

from __future__ import annotations

import pytest
import torch

import fxshap
from tests.helpers import assert_exact, assert_same_values
from tests.networks import NETWORKS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

#: One of each kind of operation.
SOME = (
    "gelu_module",
    "convolution_modules",
    "batch_norm",
    "layer_norm",
    "softmax_inside",
    "max_pool2d_overlapping",
    "scaled_dot_product_attention",
    "lstm_stacked_bidirectional",
    "sort_topk",
    "mixture_of_experts",
    "experts_by_mask",
    "experts_by_index",
    "grid_sample",
)
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-9}


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_it_adds_up_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    network = NETWORKS[name]
    model = network.build().to("cuda", dtype)
    background, samples = (
        [x.to("cuda") for x in network.inputs(count, seed=seed, dtype=dtype)]
        for count, seed in ((5, 1), (3, 2))
    )
    assert_exact(model, fxshap.make_explainable(model), background, samples, LIMITS[dtype])


def test_a_model_that_moves_is_captured_again() -> None:
    network = NETWORKS["gelu_module"]
    model = network.build().double()
    explainable = fxshap.make_explainable(model)
    background, samples = (network.inputs(n, seed=n, dtype=torch.float64) for n in (5, 3))
    before = assert_exact(model, explainable, background, samples, 1e-9)
    model.cuda()
    there = [[x.cuda() for x in inputs] for inputs in (background, samples)]
    assert_exact(model, explainable, *there, 1e-9)
    model.cpu()
    assert_same_values(assert_exact(model, explainable, background, samples, 1e-9), before)
