"""Explain one network with unmodified SHAP and say how exact it was."""

from __future__ import annotations

import gc
import time
import warnings
from dataclasses import asdict, dataclass, field

import shap
import torch
from torch import Tensor, nn

import fxshap
from benchmarks.zoo.entry import Entry
from fxshap.rewrite import generic_operations

OUTPUTS = 2
REFERENCES = 2
CALIBRATION = 6
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class Measurement:
    """What was measured on one network in one floating-point type.

    Attributes
    ----------
    additivity_error : float
        max |sum(phi) - (f(x) - mean f(refs))| / max(|f(x)|, |f(refs)|).
    output_difference : float
        Largest difference of the paired from the plain output, relative to the largest output.
    capture_seconds : float
    generic : list of str
        The operations that took the generic rule.
    failure : str
        Why there is nothing to measure, if so.
    """

    zoo: str
    family: str
    name: str
    dtype: str
    additivity_error: float = float("nan")
    output_difference: float = float("nan")
    capture_seconds: float = float("nan")
    generic: list[str] = field(default_factory=list)
    failure: str = ""

    def record(self) -> dict[str, object]:
        """Return the measurement as plain data."""
        return asdict(self)


class Head(nn.Module):
    """A network reduced to its first few outputs."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.network = entry.build()
        self.output = entry.output

    def forward(self, x: Tensor) -> Tensor:
        """Pick and flatten the output."""
        return self.output(self.network(x)).flatten(1)[:, :OUTPUTS]


def measure(entry: Entry, dtype: torch.dtype) -> Measurement:
    """Measure one network."""
    result = Measurement(entry.zoo, entry.family, entry.name, str(dtype).removeprefix("torch."))
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            fill_in(result, entry, dtype)
    except Exception as error:  # whatever goes wrong is the result
        line = (str(error).strip().splitlines() or [""])[0]
        result.failure = f"{type(error).__name__}: {line[:200]}"
    gc.collect()  # large networks go before the next comes
    return result


def fill_in(result: Measurement, entry: Entry, dtype: torch.dtype) -> None:
    """Build, calibrate and explain a network."""
    model = Head(entry).to(dtype)
    calibrate(model, torch.randn(CALIBRATION, *entry.shape).to(dtype))
    sample = torch.randn(1, *entry.shape).to(dtype)
    references = torch.randn(REFERENCES, *entry.shape).to(dtype)
    explainable = fxshap.make_explainable(model)

    start = time.perf_counter()
    explainable.prepare(references)
    result.capture_seconds = time.perf_counter() - start
    result.generic = generic_operations(explainable.attribute)

    values = shap.DeepExplainer(explainable, references).shap_values(sample, check_additivity=False)
    total = torch.as_tensor(values).double().flatten(1, -2).sum(1)
    with torch.no_grad():
        paired, _ = explainable.observe(sample)
        f_x, f_r = model(sample), model(references)
        scale = max(f_x.abs().max(), f_r.abs().max()).double()
        result.output_difference = float((paired - f_x).abs().max() / scale)
        gap = f_x.double() - f_r.double().mean(0)
    result.additivity_error = float((total - gap).abs().max() / scale)


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Tensor) -> None:
    """Give batch norms statistics and zero-initialised matrices some noise."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.reset_running_stats()
            module.momentum = None
    if any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        model.train()
        model(inputs)
        model(inputs.flip(0))
    model.eval()
    for weight in model.parameters():
        if weight.dim() > 1 and not weight.any():
            weight.normal_(std=0.02)
