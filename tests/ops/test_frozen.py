"""Frozen kernels have the values and input gradients of torch's own, and save no input."""

import gc
import weakref

import pytest
import shap
import torch

import fxshap
from fxshap.ops.frozen import (
    CONVOLUTIONS,
    frozen_batch_norm,
    frozen_convolution,
    frozen_linear,
)


@pytest.mark.parametrize("target", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(
    "window", [(), ([2],), ([2], [1]), ([2], [1], [1], 2), ([1], [2], [2], 1)], ids=str
)
def test_frozen_convolutions_are_those_of_torch(target, window):
    dims = CONVOLUTIONS[target]
    groups = window[3] if len(window) > 3 else 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, *[7] * dims, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4 // groups, *[3] * dims, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    ours, theirs = (
        frozen_convolution(dims, x, weight, bias, *window),
        target(x, weight, bias, *(v * dims if isinstance(v, list) else v for v in window)),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, grad), torch.autograd.grad(theirs, x, grad)
    )


def test_the_input_is_not_saved():
    x = torch.randn(1, 2, 8, requires_grad=True)
    hidden = x * 2
    reference = weakref.ref(hidden)
    out = frozen_convolution(1, hidden, torch.randn(2, 2, 3))
    del hidden
    gc.collect()
    assert reference() is None
    assert out.requires_grad


def test_only_convolutions_with_constant_weights_are_frozen():
    class Convolutions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.constant = torch.nn.Conv1d(2, 2, 3)

        def forward(self, x):
            weight = x.mean(0, keepdim=True).tanh()
            return torch.nn.functional.conv1d(self.constant(x), weight[..., :2]).flatten(1)

    explainable = fxshap.make_explainable(Convolutions(), torch.randn(4, 2, 5))
    code = explainable.rescaled_graph.code
    assert code.count("frozen_convolution(1, ") == 1
    assert "torch.ops.aten.conv1d.default" in code


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 7), (2, 4, 3, 5), (2, 4, 3, 2, 2)], ids=str)
def test_frozen_batch_norms_are_those_of_torch(shape, affine):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    mean, weight, bias = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    var = 0.1 + torch.rand(4, generator=generator, dtype=torch.float64)
    weight, bias = (weight, bias) if affine else (None, None)
    ours = frozen_batch_norm(x, weight, bias, mean, var, 1e-5)
    theirs = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)
    assert torch.equal(ours, theirs)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, grad), torch.autograd.grad(theirs, x, grad)
    )


def test_batch_norms_do_not_save_their_input():
    hidden = torch.randn(1, 2, 8, requires_grad=True) * 2
    reference = weakref.ref(hidden)
    out = frozen_batch_norm(hidden, None, None, torch.zeros(2), torch.ones(2), 1e-5)
    del hidden
    gc.collect()
    assert reference() is None
    assert out.requires_grad


def test_outputs_are_the_models_own_bit_for_bit():
    """Of images with the channels last, in single precision and for SHAP as well."""
    torch.manual_seed(0)
    layers = []
    for _ in range(6):
        norm = torch.nn.BatchNorm2d(16)
        torch.nn.init.uniform_(norm.running_var, 0.01, 1)
        torch.nn.init.normal_(norm.running_mean)
        layers += [torch.nn.Conv2d(16, 16, 3, padding=1), norm, torch.nn.GELU()]
    head = [torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(256, 3)]
    model = torch.nn.Sequential(*layers, *head).eval()
    images = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    explainable = fxshap.make_explainable(model, images)
    seen = []
    explainable.register_forward_hook(lambda module, inputs, output: seen.append(output))
    shap.DeepExplainer(explainable, images[:2]).shap_values(images[2:3], check_additivity=False)
    with torch.no_grad():
        sample, references = model(images[2:3]), model(images[:2])
    endpoints = seen[-1].detach().chunk(2)
    assert torch.equal(endpoints[0][:1], sample) and torch.equal(endpoints[1], references)


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (8,), (0, 8)], ids=str)
def test_frozen_linear_layers_are_those_of_torch(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    weight, bias = torch.randn(3, 8, generator=generator), torch.randn(3, generator=generator)
    ours, theirs = frozen_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(ours, theirs)
    grad = torch.randn(ours.shape, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, grad), torch.autograd.grad(theirs, x, grad)
    )


def test_only_linear_layers_of_float32_with_constant_weights_are_frozen():
    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.constant = torch.nn.Linear(4, 4)

        def forward(self, x):
            return torch.nn.functional.linear(self.constant(x), x.mean(0, keepdim=True).tanh())

    for dtype, count in ((torch.float32, 1), (torch.float64, 0)):
        example = torch.randn(4, 4, dtype=dtype)
        explainable = fxshap.make_explainable(Layers().to(dtype), example)
        assert explainable.rescaled_graph.code.count("frozen_linear(") == count
        assert "frozen_linear" not in explainable.tapped_graph.code
