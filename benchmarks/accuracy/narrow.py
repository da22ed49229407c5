"""How exact explanations in narrow types are: half precision, and autocast inside the model.

Run with ``make narrow``; writes its section of ``docs/reliability.md``.
"""

from __future__ import annotations

import sys
import warnings
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxshap
from benchmarks.page import replace_section
from fxshap.verification.metrics import additivity_error
from fxshap.verification.verify import shap_values
from tests.networks import NETWORKS, Network

PAGE = Path("docs/reliability.md")
#: The most units in the last place, of the largest output, that an explanation may be off.
LIMIT = 20
DTYPES = (torch.bfloat16, torch.float16)


class Halved(nn.Module):
    """A model in a narrow type, behind the float32 that SHAP's arrays need."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        narrow = (x.to(self.dtype) if x.is_floating_point() else x for x in inputs)
        return self.model(*narrow).float()


class Cast(nn.Module):
    """A model that runs in autocast."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.model(*inputs).float()


WAYS = {"half precision": Halved, "autocast": Cast}


def build(name: str, way: str, dtype: torch.dtype) -> nn.Module | None:
    """Build a network of the collection in a narrow type; ``None`` if PyTorch cannot run it."""
    network = NETWORKS[name]
    model = WAYS[way](network.build().float(), dtype).eval()
    try:
        with torch.no_grad():
            output = model(*network.inputs(2, seed=1, dtype=torch.float32))
    except RuntimeError:  # an operation has no kernel for the type, or mixes it with another
        return None
    return model if bool(output.isfinite().all()) else None


def error(model: nn.Module, network: Network, dtype: torch.dtype) -> float:
    """Return the additivity error, in units in the last place of the largest output."""
    references = list(network.inputs(5, seed=1, dtype=torch.float32))
    samples = list(network.inputs(3, seed=2, dtype=torch.float32))
    values, _ = shap_values(fxshap.make_explainable(model), references, samples, None)
    return additivity_error(model, references, samples, values) / torch.finfo(dtype).eps


def main() -> int:
    """Measure every network in every way, write the section, and return 1 if one is too far."""
    warnings.simplefilter("ignore")
    found: dict[tuple[str, torch.dtype], dict[str, float]] = {}
    cases = [(name, way, dtype) for way in WAYS for dtype in DTYPES for name in NETWORKS]
    for name, way, dtype in tqdm(cases, unit="network"):
        model = build(name, way, dtype)
        if model is not None:
            found.setdefault((way, dtype), {})[name] = error(model, NETWORKS[name], dtype)
    rows = []
    for (way, dtype), errors in found.items():
        worst = max(errors, key=errors.__getitem__)
        rows.append(
            [
                way,
                str(dtype).removeprefix("torch."),
                f"{len(errors)} of {len(NETWORKS)}",
                f"{np.median(list(errors.values())):.1f}",
                f"{errors[worst]:.1f} ({worst})",
            ]
        )
    headers = ["", "type", "networks that PyTorch runs", "median", "worst"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    text = f"{table}\n\n`make narrow`, {date.today()}, torch {torch.__version__}, on the CPU."
    print(text)
    replace_section(PAGE, "narrow types", text)
    return int(any(not e <= LIMIT for errors in found.values() for e in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
