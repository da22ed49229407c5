"""The chart of the coverage page: the additivity error of every network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.zoo.measure import Measurement
from benchmarks.zoo.report import LIMITS, grouped

COLOURS = {"float32": "#c65102", "float64": "#1f6f8b"}
#: Errors of exactly nothing, and smaller ones, are drawn here.
SMALLEST = 1e-18


def draw(path: Path, measurements: Sequence[Measurement]) -> None:
    """Draw every network's error in each type, sorted within its zoo, against the limits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    zoos = [zoo for zoo, _ in grouped(measurements, "zoo")]
    figure, axes = plt.subplots(
        1,
        len(zoos),
        figsize=(10, 3.6),
        sharey=True,
        squeeze=False,
        width_ratios=[max(10, len({m.name for m in measurements if m.zoo == z})) for z in zoos],
        layout="constrained",
    )
    for zoo, axis in zip(zoos, axes[0], strict=True):
        for dtype, colour in COLOURS.items():
            errors = sorted(
                max(m.additivity_error, SMALLEST)
                for m in measurements
                if m.zoo == zoo and m.dtype == dtype and m.additivity_error == m.additivity_error
            )
            axis.plot(errors, ".", color=colour, markersize=4, label=dtype)
            axis.axhline(LIMITS[dtype], color=colour, linewidth=0.8, linestyle="--")
        axis.set_yscale("log")
        axis.set_title(zoo, fontsize=10)
        axis.set_xlabel("networks, sorted", fontsize=8)
        axis.set_xticks([])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("additivity error")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
