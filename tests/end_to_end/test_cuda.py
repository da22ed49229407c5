"""Models on a GPU: additive there too, and with the values of the processor; skipped without one.

``FXSHAP_TEST_DEVICE=cpu`` runs what can be run on another device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import shap
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import fxshap
from fxshap.errors import InputError
from fxshap.rules.core.operation import Operation
from fxshap.testing.rule_check import Case, additivity_errors, check
from fxshap.verification.metrics import additivity_error
from fxshap.verification.verify import shap_values
from tests.helpers import assert_same_values
from tests.networks import NETWORKS
from tests.networks.low_precision import DTYPES, LIMIT, HalfPrecision
from tests.rules.cases import ALL

DEVICE = torch.device(os.environ.get("FXSHAP_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

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
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
FLOATS = pytest.mark.parametrize("dtype", LIMITS, ids=str)
HALVES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """Compute float32 products in float32."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


def to_device(value: Any) -> Any:
    """Move all tensors of a nested value to the device."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(DEVICE), value)


def data(name: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """References and samples of a network on the device; one sample is a reference."""
    network = NETWORKS[name]
    references = list(network.inputs(6, seed=1, dtype=dtype))
    samples = network.inputs(2, seed=2, dtype=dtype)
    mixed = [torch.cat([x, r[:1]]) for x, r in zip(samples, references, strict=True)]
    return to_device(references), to_device(mixed)


@pytest.fixture(autouse=True)
def no_fused_encoder_layers() -> Iterator[None]:
    """Compute encoder layers as they are written.

    Without gradients, torch runs a fused kernel for them. On CUDA its output differs from that of
    the layer for `norm_first`, in float64 too, and attributions cannot add up to both.
    """
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def error(
    model: nn.Module, references: list[Tensor], samples: list[Tensor], **options: Any
) -> float:
    """Explain with unmodified SHAP and return the additivity error."""
    values, _ = shap_values(fxshap.make_explainable(model, **options), references, samples, None)
    assert all(np.isfinite(phi).all() for phi in values)
    return additivity_error(model, references, samples, values)


# --- networks -----------------------------------------------------------------------------------


@FLOATS
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_adds_up(name: str, dtype: torch.dtype) -> None:
    model = NETWORKS[name].build().to(DEVICE, dtype)
    assert error(model, *data(name, dtype)) <= LIMITS[dtype]


@FLOATS
@pytest.mark.parametrize("name", SOME)
def test_the_explainer_adds_up(name: str, dtype: torch.dtype) -> None:
    model = NETWORKS[name].build().to(DEVICE, dtype)
    references, samples = data(name, dtype)
    found = fxshap.DeepExplainer(model, references).shap_values(samples)
    values = found if isinstance(found, list) else [found]
    assert additivity_error(model, references, samples, values) <= LIMITS[dtype]


@pytest.mark.parametrize("options", [{"refine": 2}, {"rule": "variance"}], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_options_add_up(name: str, options: dict[str, Any]) -> None:
    model = NETWORKS[name].build().to(DEVICE)
    assert error(model, *data(name, torch.float32), **options) <= LIMITS[torch.float32]


@pytest.mark.parametrize("name", SOME)
def test_values_are_those_of_the_processor(name: str) -> None:
    model = NETWORKS[name].build().double()
    references, samples = data(name, torch.float64)
    here = fxshap.make_explainable(model)
    expected, _ = shap_values(here, [r.cpu() for r in references], [x.cpu() for x in samples], None)
    there = fxshap.make_explainable(NETWORKS[name].build().to(DEVICE, torch.float64))
    found, _ = shap_values(there, references, samples, None)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * max(np.abs(b).max(), 1))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_second_gpu_adds_up() -> None:
    model = NETWORKS["gelu_module"].build().to("cuda:1")
    references, samples = data("gelu_module", torch.float32)
    there = [[x.to("cuda:1") for x in inputs] for inputs in (references, samples)]
    assert error(model, *there) <= LIMITS[torch.float32]


def test_a_model_that_moves_is_captured_again() -> None:
    model = NETWORKS["gelu_module"].build().double()
    explainable = fxshap.make_explainable(model)
    there = data("gelu_module", torch.float64)
    here = [[x.cpu() for x in inputs] for inputs in there]
    before, _ = shap_values(explainable, *here, None)
    model.to(DEVICE)
    found, _ = shap_values(explainable, *there, None)
    assert additivity_error(model, *there, found) <= 1e-12
    model.cpu()
    after, _ = shap_values(explainable, *here, None)
    assert_same_values(after, before)


@pytest.mark.parametrize("name", ["gelu_module", "softmax_inside"])
def test_compiled_models_add_up(name: str) -> None:
    model = NETWORKS[name].build().to(DEVICE)
    assert error(model, *data(name, torch.float32), compile=True) <= 1e-5


@pytest.mark.parametrize("method", ["shap", "capture"])
def test_inputs_on_another_device_are_refused(method: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).to(DEVICE)
    inputs = torch.randn(5, 4, device="cpu" if ON_GPU else "meta")
    explainable = fxshap.make_explainable(model)
    with pytest.raises(InputError, match="device"):
        shap.DeepExplainer(explainable, inputs) if method == "shap" else explainable.capture(inputs)


@pytest.mark.skipif(not ON_GPU, reason="only the memory of a GPU can be limited")
def test_the_explainer_halves_batches_when_memory_is_short() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(1), nn.Linear(2**16, 2)
    )
    model = model.eval().to(DEVICE)
    references, samples = (torch.randn(n, 3, 32, 32, device=DEVICE) for n in (16, 64))
    explainer = fxshap.DeepExplainer(model, references, batch_size=len(samples))
    explainer.shap_values(samples[:1])  # captures
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + 2**30) / torch.cuda.mem_get_info()[1]
    )
    try:
        values = explainer.shap_values(samples)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert additivity_error(model, [references], [samples], [values]) <= LIMITS[torch.float32]


# --- layers with kernels of their own -----------------------------------------------------------


class Last(nn.Module):
    """A recurrent layer and a linear layer of its last output."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


@FLOATS
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
def test_recurrent_layers_add_up(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = kind(8, 32, num_layers=2, bidirectional=True, batch_first=True)
    model = Last(layer, 64).eval().to(DEVICE, dtype)
    references, samples = (torch.randn(n, 12, 8).to(DEVICE, dtype) for n in (5, 3))
    assert error(model, [references], [samples]) <= LIMITS[dtype]


class Attention(nn.Module):
    """Attention in one kernel of PyTorch's choice, or of ours."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.project, self.head, self.causal = nn.Linear(32, 96), nn.Linear(32, 2), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(y.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("backend", ["MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION"])
def test_attention_kernels_add_up(backend: str, causal: bool) -> None:
    torch.manual_seed(0)
    half = backend == "FLASH_ATTENTION"  # has no kernel of float32
    model: nn.Module = Attention(causal).eval()
    model = (HalfPrecision(model, torch.float16) if half else model).to(DEVICE)
    references, samples = (torch.randn(n, 16, 32).to(DEVICE) for n in (5, 3))
    limit = LIMIT * torch.finfo(torch.float16).eps if half else 1e-5
    with sdpa_kernel([getattr(SDPBackend, backend), SDPBackend.MATH]):
        assert error(model, [references], [samples]) <= limit


@FLOATS
def test_channels_last_images_add_up(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, stride=2), nn.GroupNorm(4, 32), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip
    model(torch.randn(32, 3, 16, 16))
    model = model.eval().to(DEVICE, dtype).to(memory_format=torch.channels_last)
    references, samples = (
        torch.randn(n, 3, 16, 16).to(DEVICE, dtype, memory_format=torch.channels_last)
        for n in (5, 3)
    )
    assert error(model, [references], [samples]) <= LIMITS[dtype]


# --- low precision ------------------------------------------------------------------------------


class Autocast(nn.Module):
    """A model that runs in autocast on the device."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, self.dtype):
            return self.model(*inputs).float()


@HALVES
@pytest.mark.parametrize("variant", [HalfPrecision, Autocast], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", SOME)
def test_low_precision_adds_up(name: str, variant: type[nn.Module], dtype: torch.dtype) -> None:
    model = variant(NETWORKS[name].build(), dtype).eval().to(DEVICE)
    references, samples = data(name, torch.float32)
    try:
        with torch.no_grad():
            model(*references)
    except RuntimeError as problem:
        pytest.skip(f"PyTorch cannot run it: {problem}")
    assert error(model, references, samples) <= LIMIT * torch.finfo(dtype).eps


# --- rules --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnDevice(Case):
    """A case whose tensors are on the device."""

    @classmethod
    def of(cls, case: Case) -> OnDevice:
        return cls(**{field.name: getattr(case, field.name) for field in fields(case)})

    def draw(self, dtype: torch.dtype) -> tuple[Operation, list[Tensor], list[Tensor]]:
        operation, r, x = super().draw(dtype)
        arguments = tuple(to_device(argument) for argument in operation.arguments)
        object.__setattr__(operation, "arguments", arguments)
        return operation, to_device(r), to_device(x)


CASES = pytest.mark.parametrize("case", ALL, ids=str)


@FLOATS
@CASES
def test_rules_restore_the_finite_difference(case: Case, dtype: torch.dtype) -> None:
    check(OnDevice.of(case), dtype)


def units(case: Case, dtype: torch.dtype) -> float:
    """Return the largest error of a rule, in units in the last place of the outputs."""
    errors, multipliers = additivity_errors(case, *case.draw(dtype))
    finite = all(m is None or bool(m.isfinite().all()) for m in multipliers)
    return float(errors.max()) / torch.finfo(dtype).eps if finite else torch.inf


@HALVES
@CASES
def test_rules_in_low_precision_do_as_on_the_processor(case: Case, dtype: torch.dtype) -> None:
    if case.decomposition is not None:
        pytest.skip("it has no rule")
    try:
        expected = units(case, dtype)
    except (NotImplementedError, RuntimeError):
        pytest.skip("the processor has no kernel for this type")
    if not expected < torch.inf:
        pytest.skip("the type does not hold these multipliers")
    assert units(OnDevice.of(case), dtype) <= max(LIMIT, 2 * expected)
