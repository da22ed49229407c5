"""The peak memory of the device, from the allocator's own figures, for ResNet-50."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import shap
import torch
from torch import Tensor, nn

import fxshap
from benchmarks.performance.methods import timed
from benchmarks.performance.rates import Settings, fresh, workload
from benchmarks.performance.results import Results, short

REFERENCES = (20, 100)
SAMPLES = 4


def with_shap(model: nn.Module, references: Tensor, samples: Tensor) -> Callable[[], Any]:
    """Explain the top output of one sample with SHAP."""
    explainer = shap.DeepExplainer(model, references)
    options = {"ranked_outputs": 1, "check_additivity": False}
    return lambda: explainer.shap_values(samples[:1], **options)


def with_fxshap(model: nn.Module, references: Tensor, samples: Tensor) -> Callable[[], Any]:
    """Explain the top output of one sample with SHAP on the explainable model."""
    return with_shap(fxshap.make_explainable(model), references, samples)


def with_explainer(
    model: nn.Module, references: Tensor, samples: Tensor, **options: Any
) -> Callable[[], Any]:
    """Explain the top output of some samples with the explainer."""
    explainer = fxshap.DeepExplainer(model, references, **options)
    return lambda: explainer.shap_values(samples, ranked_outputs=1, check_additivity=False)


def explainer(**options: Any) -> Callable[..., Callable[[], Any]]:
    """Return the explanation by the explainer with these options."""
    return lambda *inputs: with_explainer(*inputs, **options)


METHODS: dict[str, Callable[..., Callable[[], Any]]] = {
    "SHAP, 1 sample": with_shap,
    "SHAP, explainable, 1 sample": with_fxshap,
    f"explainer, {SAMPLES} samples": explainer(),
    f"explainer, {SAMPLES} samples, batch_size=1": explainer(batch_size=1),
    f"explainer, {SAMPLES} samples, reference_batch_size=10": explainer(reference_batch_size=10),
}


def measure(settings: Settings, results: Results, seconds: float) -> None:
    """Measure every method with few and with many references, one output."""
    end = time.monotonic() + seconds
    work = workload("ResNet-50", settings)
    samples = torch.randn(SAMPLES, *work.shape).to(settings.device)
    for count in REFERENCES if settings.large else (2, 4):
        references = torch.randn(count, *work.shape).to(settings.device)
        for name, make in METHODS.items():
            facts: dict[str, Any] = {"references": count, "method": name}
            if time.monotonic() > end:
                results.add("memory", **facts, error="the time was over")
                continue
            try:
                facts |= peak(make, fresh(work, settings), references, samples)
            except Exception as error:
                facts["error"] = short(error)
            results.add("memory", **facts)


def peak(
    make: Callable[..., Callable[[], Any]], model: nn.Module, references: Tensor, samples: Tensor
) -> dict[str, float]:
    """Return the peak over what the model and the inputs take, in MiB, and the seconds."""
    device = references.device
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    idle = torch.cuda.memory_allocated(device) if on_gpu else 0
    explain = make(model, references, samples)
    explain()
    seconds = timed(explain, device)
    most = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    return {"mebibytes": (most - idle) / 2**20, "seconds": seconds}
