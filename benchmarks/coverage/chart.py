"""The chart of the coverage page: the additivity error of every network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.coverage.measure import Measurement
from benchmarks.coverage.report import LIMITS, NARROW_LIMIT, grouped, is_narrow

#: What is drawn: (name, colour, limit, whether a measurement belongs to it).
SERIES = (
    ("float32", "#c65102", LIMITS["float32"], lambda m: m.dtype == "float32"),
    ("float64", "#1f6f8b", LIMITS["float64"], lambda m: m.dtype == "float64" and not m.narrow),
    ("float64, narrow", "#7ba05b", NARROW_LIMIT, is_narrow),
)
#: Errors of exactly nothing, and smaller ones, are drawn here.
SMALLEST = 1e-17


def draw(path: Path, measurements: Sequence[Measurement]) -> None:
    """Draw every network's error, sorted within its zoo, against the limits (dashed)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    zoos = grouped([m for m in measurements if m.additivity_error == m.additivity_error], "zoo")
    figure, axes = plt.subplots(
        1,
        len(zoos),
        figsize=(10, 3.6),
        sharey=True,
        squeeze=False,
        width_ratios=[max(60, len({m.name for m in members})) for _, members in zoos],
        layout="constrained",
    )
    for (zoo, members), axis in zip(zoos, axes[0], strict=True):
        for name, colour, limit, belongs in SERIES:
            errors = sorted(max(m.additivity_error, SMALLEST) for m in members if belongs(m))
            axis.plot(errors, ".", color=colour, markersize=4, label=name)
            axis.axhline(limit, color=colour, linewidth=0.8, linestyle="--")
        axis.set_yscale("log")
        axis.set_ylim(SMALLEST / 3, 1e-2)
        axis.set_title(zoo, fontsize=10)
        axis.set_xlabel("networks, sorted", fontsize=8)
        axis.set_xticks([])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("additivity error")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
