"""How the time of an explanation grows with references, samples, outputs and depth.

The tabular network of :mod:`benchmarks.performance.workloads`, one size changed at a time. A slope
is that of the logarithm of the time over the logarithm of the size, by least squares: 1 is linear.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.adapters import with_fxshap, with_shap
from benchmarks.performance.workloads import mlp

FIGURE = Path("docs/figures/speed_growth.png")


@dataclass(frozen=True)
class Sizes:
    """The sizes of one explanation."""

    references: int = 100
    samples: int = 4
    outputs: int = 4
    depth: int = 4


GROWTH = {
    "references": (50, 100, 200, 400, 800),
    "samples": (2, 4, 8, 16, 32),
    "outputs": (2, 4, 8, 16, 32),
    "depth": (2, 4, 8, 16, 32),
}
Times = dict[str, dict[str, list[float]]]  # of each axis and method, in seconds


def explanations(sizes: Sizes) -> dict[str, Callable[[], object]]:
    """Return the explanation to time, on the explainable model and on the original."""
    torch.manual_seed(0)
    model = mlp(sizes.depth, sizes.outputs).eval()
    background, samples = torch.randn(sizes.references, 30), torch.randn(sizes.samples, 30)
    methods = {"fxshap": with_fxshap, "SHAP": with_shap}
    return {
        name: partial(method(model, [background], sizes.outputs), [samples])
        for name, method in methods.items()
    }


def measure(rounds: int) -> Times:
    """Time every size of every axis, the methods in turns."""
    found: Times = {}
    for axis, values in tqdm(GROWTH.items(), unit="axis"):
        found[axis] = {"fxshap": [], "SHAP": []}
        for value in values:
            explain = explanations(replace(Sizes(), **{axis: value}))
            taken: dict[str, list[float]] = {name: [] for name in explain}
            for _ in range(rounds + 1):  # the first one warms up
                for name, run in explain.items():
                    start = time.perf_counter()
                    run()
                    taken[name].append(time.perf_counter() - start)
            for name, times in taken.items():
                found[axis][name].append(statistics.median(times[1:]))
    return found


def slope(sizes: tuple[int, ...], times: list[float]) -> float:
    """Return the slope of log time over log size."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def table(found: Times) -> str:
    """Return the slopes, and the first and last times, as a Markdown table."""
    rows = [
        [axis, f"{GROWTH[axis][0]} to {GROWTH[axis][-1]}", method,
         f"{1e3 * times[0]:.0f}", f"{1e3 * times[-1]:.0f}", f"{slope(GROWTH[axis], times):.2f}"]
        for axis, methods in found.items()
        for method, times in methods.items()
    ]  # fmt: skip
    header = ["axis", "sizes", "method", "first, ms", "last, ms", "slope"]
    return str(tabulate(rows, header, tablefmt="github", disable_numparse=True))


def draw(found: Times, path: Path = FIGURE) -> None:
    """Draw a panel an axis, in logarithmic scales."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(11, 3), sharey=True, layout="constrained")
    for panel, (axis, methods) in zip(panels, found.items(), strict=True):
        for method, times in methods.items():
            label = f"{method} ({slope(GROWTH[axis], times):.2f})"
            panel.loglog(GROWTH[axis], [1e3 * t for t in times], "o-", label=label, markersize=4)
        panel.set_xticks(GROWTH[axis], [str(value) for value in GROWTH[axis]])
        panel.minorticks_off()
        panel.set_xlabel(axis)
        panel.legend(title="slope", frameon=False, fontsize=8, title_fontsize=8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time of an explanation, ms")
    ticks = [10**k for k in range(math.floor(math.log10(panels[0].get_ylim()[0])) + 1, 5)]
    panels[0].set_yticks([t for t in ticks if t <= panels[0].get_ylim()[1]])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
