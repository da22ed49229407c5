"""Lean convolutions: the values and the input gradients of torch's own, without the input kept."""

import gc
import weakref

import pytest
import torch

import fxshap
from fxshap.lean import CONVOLUTIONS, lean_convolution


@pytest.mark.parametrize("target", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(
    "window", [(), ([2],), ([2], [1]), ([2], [1], [1], 2), ([1], [2], [2], 1)], ids=str
)
def test_lean_convolutions_are_those_of_torch(target, window):
    dims = CONVOLUTIONS[target]
    groups = window[3] if len(window) > 3 else 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, *[7] * dims, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4 // groups, *[3] * dims, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    ours, theirs = (
        lean_convolution(dims, x, weight, bias, *window),
        target(x, weight, bias, *(v * dims if isinstance(v, list) else v for v in window)),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, grad), torch.autograd.grad(theirs, x, grad)
    )


def test_the_input_is_not_kept():
    x = torch.randn(1, 2, 8, requires_grad=True)
    hidden = x * 2
    kept = weakref.ref(hidden)
    out = lean_convolution(1, hidden, torch.randn(2, 2, 3))
    del hidden
    gc.collect()
    assert kept() is None
    assert out.requires_grad


def test_only_convolutions_with_constant_weights_are_lean():
    class Convolutions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.constant = torch.nn.Conv1d(2, 2, 3)

        def forward(self, x):
            weight = x.mean(0, keepdim=True).tanh()
            return torch.nn.functional.conv1d(self.constant(x), weight[..., :2]).flatten(1)

    explainable = fxshap.make_explainable(Convolutions(), torch.randn(4, 2, 5))
    code = explainable.attribute.code
    assert code.count("lean_convolution(1, ") == 1
    assert "torch.ops.aten.conv1d.default" in code
