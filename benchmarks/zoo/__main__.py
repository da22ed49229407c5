"""Measure the model zoos and write the table: ``python -m benchmarks.zoo``.

One line a network goes to standard output as it is measured, and to a file of results, so that a
run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.zoo.entry import Entry
from benchmarks.zoo.measure import Measurement, measure
from benchmarks.zoo.report import LIMITS, write_table

RESULTS = Path("benchmarks/zoo/results.jsonl")
TABLE = Path("docs/coverage.md")


def entries(zoos: list[str]) -> Iterator[Entry]:
    """Yield the networks of the chosen zoos."""
    if "torchvision" in zoos:
        from benchmarks.zoo.vision import torchvision_entries

        yield from torchvision_entries()
    if "transformers" in zoos:
        from benchmarks.zoo.language import transformers_entries

        yield from transformers_entries()
    if "timm" in zoos:
        from benchmarks.zoo.vision import timm_entries

        yield from timm_entries()


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, record and tabulate; return 1 if a network is worse than its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--zoos", nargs="+", default=["torchvision", "timm", "transformers"])
    parser.add_argument("--names", default="*", metavar="PATTERN", help="names, as in a shell")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args(arguments)

    logging.disable(logging.WARNING)
    if options.fresh:
        options.results.unlink(missing_ok=True)
    done = read_results(options.results)
    chosen = [e for e in entries(options.zoos) if fnmatch.fnmatch(e.name, options.names)]
    work = [
        (entry, dtype)
        for entry, dtype in itertools.product(chosen, options.dtypes)
        if (entry.zoo, entry.name, dtype) not in done
    ]
    for entry, dtype in tqdm(work, unit="network", file=sys.stderr):
        found = measure(entry, getattr(torch, dtype))
        done[entry.zoo, entry.name, dtype] = found
        with options.results.open("a") as file:
            file.write(json.dumps(found.record()) + "\n")
        tqdm.write(line(found), file=sys.stdout)
    measurements = list(done.values())
    write_table(options.output, measurements)
    worse = [m for m in measurements if not m.additivity_error <= LIMITS[m.dtype]]
    return 1 if worse else 0


def read_results(path: Path) -> dict[tuple[str, str, str], Measurement]:
    """Read what an earlier run has measured."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [Measurement(**json.loads(text)) for text in lines]
    return {(m.zoo, m.name, m.dtype): m for m in found}


def line(found: Measurement) -> str:
    """Describe a measurement in one line."""
    start = f"{found.zoo:12s} {found.name:40s} {found.dtype:8s}"
    if found.failure:
        return f"{start} {found.failure}"
    mark = "" if found.additivity_error <= LIMITS[found.dtype] else "  <-- over the limit"
    if math.isnan(found.additivity_error):
        mark = "  <-- not a number"
    return f"{start} {found.additivity_error:.1e} captured in {found.capture_seconds:.1f} s{mark}"


if __name__ == "__main__":
    sys.exit(main())
