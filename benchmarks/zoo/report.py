"""The coverage table, by zoo and family."""

from __future__ import annotations

import datetime
import platform
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tabulate import tabulate

from benchmarks.zoo.measure import Measurement

LIMITS = {"float32": 1e-4, "float64": 1e-9}
PACKAGES = ("torch", "shap", "torchvision", "timm", "transformers")


def write_table(path: Path, measurements: list[Measurement]) -> None:
    """Write the Markdown table of all measurements."""
    groups: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for found in measurements:
        groups[found.zoo, found.family].append(found)
    rows = [row(*key, members) for key, members in sorted(groups.items())]
    header = [
        "zoo",
        "family",
        "networks",
        "explained",
        *LIMITS,
        "output",
        "capture",
        "generic rule",
    ]
    passed, total = count(measurements)
    text = f"""# Coverage

{passed} of {total} networks are explained within the limits, by unmodified SHAP and without a
change to the model: additivity error at most {LIMITS["float32"]:g} in float32 and
{LIMITS["float64"]:g} in float64. The columns show the largest error of a family in each type, the
largest difference of the paired from the plain output, the longest capture in seconds, and the
operations that took the generic rule.

{datetime.date.today()}, {versions()}, `python -m benchmarks.zoo`

{tabulate(rows, header, tablefmt="github", disable_numparse=True)}

{failures(measurements)}"""
    path.write_text(text.rstrip() + "\n")


def row(zoo: str, family: str, members: list[Measurement]) -> list[str]:
    """Summarise a family."""
    passed, total = count(members)
    errors = [worst([m.additivity_error for m in members if m.dtype == dtype]) for dtype in LIMITS]
    return [
        zoo,
        family,
        str(total),
        str(passed),
        *errors,
        worst([m.output_difference for m in members]),
        f"{max((m.capture_seconds for m in members if not m.failure), default=0.0):.1f}",
        ", ".join(sorted({name for m in members for name in m.generic})),
    ]


def count(members: list[Measurement]) -> tuple[int, int]:
    """Return how many networks are within the limits in every type, and how many there are."""
    names = {m.name for m in members}
    outside = {m.name for m in members if not m.additivity_error <= LIMITS[m.dtype]}
    return len(names - outside), len(names)


def worst(values: list[float]) -> str:
    """Return the largest of the values that are numbers."""
    numbers = [value for value in values if value == value]
    return f"{max(numbers):.0e}" if numbers else ""


def failures(measurements: list[Measurement]) -> str:
    """List the networks outside the limits with the reason."""
    lines = [
        f"- {m.zoo} {m.name}, {m.dtype}: {m.failure or f'{m.additivity_error:.1e}'}"
        for m in measurements
        if not m.additivity_error <= LIMITS[m.dtype]
    ]
    return "\n".join(["## Outside the limits", "", *lines]) if lines else ""


def versions() -> str:
    """Name the versions measured."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
