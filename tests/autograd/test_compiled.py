"""Compiled backward passes give what the rules give one by one."""

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import fxshap
from tests.helpers import assert_exact, explain
from tests.networks import NETWORKS


class Attention(nn.Module):
    """GELU, softmax, a norm and a product of two computed tensors, three outputs."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = scale
        self.hidden = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.hidden(x)
        weights = torch.softmax(z @ z.mT * self.scale, -1)
        return self.head(weights @ self.norm(nn.functional.gelu(z))).mean(1)


def data(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def compiled() -> fxshap.ExplainableModule:
    """One explainable model for several tests: what is compiled once serves them all."""
    return fxshap.make_explainable(Attention(), compile=True)


def eager(model: nn.Module, background: Tensor, samples: Tensor) -> np.ndarray:
    return explain(fxshap.make_explainable(model), [background], [samples])[0]


def backward_passes_compiled(caplog: pytest.LogCaptureFixture) -> int:
    return sum("compiles the backward pass" in message for message in caplog.messages)


def test_compiled_backward_passes_add_up_and_are_those_of_the_rules(compiled):
    assert_exact(compiled.original_model, compiled, [data(5, 1)], [data(3, 2)], 1e-5)
    (values,) = explain(compiled, [data(5, 1)], [data(3, 2)])
    expected = eager(compiled.original_model, data(5, 1), data(3, 2))
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)


def test_other_weights_and_references_need_no_compilation(compiled, caplog):
    explain(compiled, [data(5, 1)], [data(3, 2)])
    caplog.set_level(logging.DEBUG, "fxshap")
    with torch.no_grad():
        compiled.original_model.hidden.weight.mul_(-1)
    assert_exact(compiled.original_model, compiled, [data(5, 3)], [data(3, 4)], 1e-5)
    assert backward_passes_compiled(caplog) == 0


def test_what_is_taken_for_granted_is_looked_at():
    """Logits far apart cost the closed form of softmax its digits; the rules see that, and act."""
    model = Attention(scale=100.0)
    explainable = fxshap.make_explainable(model, compile=True)
    assert_exact(model, explainable, [data(5, 1)], [data(2, 2)], 1e-5)
    (values,) = explain(explainable, [data(5, 1)], [data(2, 2)])
    np.testing.assert_array_equal(values, eager(model, data(5, 1), data(2, 2)))


def test_several_passes_are_compiled_too():
    model = Attention()
    explainable = fxshap.make_explainable(model, compile=True, refine=1)
    assert_exact(model, explainable, [data(5, 1)], [data(2, 2)], 1e-5)


@pytest.mark.parametrize("name", ["max_pool2d_overlapping", "lstm_bidirectional_state"])
def test_networks_in_float64(name):
    network = NETWORKS[name]
    model = network.build().double()
    background = network.inputs(4, seed=1, dtype=torch.float64)
    samples = network.inputs(2, seed=2, dtype=torch.float64)
    explainable = fxshap.make_explainable(model, compile=True)
    assert_exact(model, explainable, background, samples, 1e-12)


def test_without_a_compiler_the_error_names_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    explainable = fxshap.make_explainable(Attention(), compile=True)
    # Not monkeypatch: it would delete the setting afterwards.
    without = inductor_config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(fxshap.CompileError, match=r"needs a C\+\+ compiler"):
        explain(explainable, [data(2, 1)], [data(2, 2)])
