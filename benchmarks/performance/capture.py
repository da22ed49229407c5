"""How long the capture of a large network, and of recurrent layers over many steps, takes.

Run with ``make capture``; writes its section of ``docs/limits.md``.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fxshap
from benchmarks.coverage.torchvision_import import torchvision
from tests.tools.pages import replace_section

PAGE = Path("docs/limits.md")
ROUNDS = 3


class Recurrent(nn.Module):
    """Classify a series by the last step of a recurrent layer in two directions."""

    def __init__(self, layer: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.layer = layer(4, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, series: Tensor) -> Tensor:
        output, _ = self.layer(series)
        return self.head(output[:, -1])


def image_network(name: str) -> tuple[nn.Module, Tensor]:
    return torchvision.models.get_model(name), torch.randn(2, 3, 224, 224)


def recurrent_network(layer: type[nn.LSTM | nn.GRU], steps: int) -> tuple[nn.Module, Tensor]:
    return Recurrent(layer), torch.randn(2, steps, 4)


#: How each network and its inputs are made, and the most seconds that a capture may take on two
#: cores.
NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], float]] = {
    "resnet50 at 224 x 224": (partial(image_network, "resnet50"), 4.0),
    "densenet201 at 224 x 224": (partial(image_network, "densenet201"), 12.0),
    **{
        f"{layer.__name__} of {steps:,} steps": (partial(recurrent_network, layer, steps), 2.0)
        for layer in (nn.LSTM, nn.GRU)
        for steps in (100, 300, 1000)
    },
}


def seconds(build: Callable[[], tuple[nn.Module, Tensor]]) -> float:
    """Return the median time to capture a network."""
    model, inputs = build()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        fxshap.make_explainable(model.eval(), inputs, progress=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> int:
    """Measure, write the section, and return 1 if a limit is passed."""
    torch.set_num_threads(2)
    found = {name: seconds(build) for name, (build, _) in NETWORKS.items()}
    rows = [f"{name} {took:.1f} s" for name, took in found.items()]
    text = (
        f"Capture, median of {ROUNDS}: {', '.join(rows)} (`make capture`, "
        f"{date.today()}, Python {platform.python_version()}, torch {torch.__version__}, 2 threads)"
    )
    print(text)
    replace_section(PAGE, "capture", text)
    return int(any(found[name] > limit for name, (_, limit) in NETWORKS.items()))


if __name__ == "__main__":
    sys.exit(main())
