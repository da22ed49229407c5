"""How long the capture of a large network takes.

Run with ``make capture``; writes its section of ``docs/limits.md``.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch

import fxshap
from benchmarks.coverage.torchvision_import import torchvision
from tests.tools.pages import replace_section

PAGE = Path("docs/limits.md")
ROUNDS = 3
#: The most seconds that a capture may take on two cores.
LIMITS = {"resnet50": 4.0, "densenet201": 12.0}


def seconds(name: str) -> float:
    """Return the median time to capture a torchvision network for images of 224 x 224."""
    model, images = torchvision.models.get_model(name).eval(), torch.randn(2, 3, 224, 224)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        fxshap.make_explainable(model, images, progress=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> int:
    """Measure, write the section, and return 1 if a limit is passed."""
    torch.set_num_threads(2)
    found = {name: seconds(name) for name in LIMITS}
    rows = [f"{name} {took:.1f} s" for name, took in found.items()]
    text = (
        f"Capture at 224 x 224, median of {ROUNDS}: {', '.join(rows)} (`make capture`, "
        f"{date.today()}, Python {platform.python_version()}, torch {torch.__version__}, 2 threads)"
    )
    print(text)
    replace_section(PAGE, "capture", text)
    return int(any(found[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
