"""The networks in bfloat16 and float16: half precision, and autocast inside the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxshap
from fxshap.verification.metrics import additivity_error
from fxshap.verification.verify import shap_values
from tests.networks import NETWORKS, Network

#: The largest additivity error, in units in the last place of the largest output.
LIMIT = 20
DTYPES = (torch.bfloat16, torch.float16)


class HalfPrecision(nn.Module):
    """A model in a low-precision type that takes and returns float32, as SHAP's arrays need."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        cast = (x.to(self.dtype) if x.is_floating_point() else x for x in inputs)
        return self.model(*cast).float()


class Autocast(nn.Module):
    """A model that runs in autocast."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.model(*inputs).float()


VARIANTS = {"half precision": HalfPrecision, "autocast": Autocast}


def build(name: str, variant: str, dtype: torch.dtype) -> nn.Module | None:
    """Build a network in a low-precision type; return ``None`` if PyTorch cannot run it."""
    network = NETWORKS[name]
    model = VARIANTS[variant](network.build().float(), dtype).eval()
    try:
        with torch.no_grad():
            output = model(*network.inputs(2, seed=1, dtype=torch.float32))
    except RuntimeError:  # an operation has no kernel for the type, or mixes it with another
        return None
    return model if bool(output.isfinite().all()) else None


def error_in_units(model: nn.Module, network: Network, dtype: torch.dtype) -> float:
    """Return the additivity error in units in the last place of the largest output."""
    references = list(network.inputs(5, seed=1, dtype=torch.float32))
    samples = list(network.inputs(3, seed=2, dtype=torch.float32))
    values, _ = shap_values(fxshap.make_explainable(model), references, samples, None)
    return additivity_error(model, references, samples, values) / torch.finfo(dtype).eps
