"""Measure the model zoos and write the coverage page: ``python -m benchmarks.coverage``.

One line a network and type goes to standard output as it is measured, and to a file of results, so
that a run that was stopped goes on where it was; what other sources of fxshap gave is measured
again. A run of everything writes docs/coverage.md, docs/coverage.csv and the figure, unless a
network is worse than the last published one: then it prints which, returns 1 and writes nothing.
With ``--update`` a run of a part does too; what it leaves out stays as it was published, with the
date of its measurement, and the page states how much that is.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.coverage import chart, report
from benchmarks.coverage.entry import Entry
from benchmarks.coverage.measure import CALIBRATION, Measurement, measure, sources

RESULTS = Path("benchmarks/coverage/results.jsonl")
DOCS = Path("docs")
COMMAND = "python -m benchmarks.coverage"


def torchvision() -> Iterator[Entry]:
    """Yield the networks of torchvision."""
    from benchmarks.coverage.vision import torchvision_entries

    return torchvision_entries()


def timm() -> Iterator[Entry]:
    """Yield the networks of timm."""
    from benchmarks.coverage.vision import timm_entries

    return timm_entries()


def transformers() -> Iterator[Entry]:
    """Yield the networks of transformers."""
    from benchmarks.coverage.language import transformers_entries

    return transformers_entries()


def diffusers() -> Iterator[Entry]:
    """Yield the networks of diffusers."""
    from benchmarks.coverage.diffusion import diffusers_entries

    return diffusers_entries()


def hand_written() -> Iterator[Entry]:
    """Yield the networks of this repository."""
    from benchmarks.coverage.hand_written import hand_written_entries

    return hand_written_entries()


#: Each imports its zoo when asked, so that one can be measured where another is not installed.
ZOOS: dict[str, Callable[[], Iterator[Entry]]] = {
    "torchvision": torchvision,
    "timm": timm,
    "transformers": transformers,
    "diffusers": diffusers,
    "hand-written": hand_written,
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoos", nargs="+", choices=ZOOS, default=list(ZOOS))
    parser.add_argument("--names", default="*", metavar="PATTERN", help="names, as in a shell")
    parser.add_argument("--dtypes", nargs="+", choices=report.LIMITS, default=list(report.LIMITS))
    parser.add_argument(
        "--initial-batch-norms", action="store_true", help="leave their weights 1 and biases 0"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where a run goes on")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument(
        "--output", type=Path, help="folder to write to even if not all is measured"
    )
    parser.add_argument(
        "--update", action="store_true", help="publish a part; the rest stays as published"
    )
    parser.add_argument("--publish", action="store_true", help="write even if something is worse")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, record and tabulate; return 1 if a network is worse than published."""
    options = parse_arguments(arguments)
    logging.disable(logging.WARNING)
    if options.fresh:
        options.results.unlink(missing_ok=True)
    entries = [
        entry
        for zoo in options.zoos
        for entry in ZOOS[zoo]()
        if fnmatch.fnmatch(entry.name, options.names)
    ]
    drawn = not options.initial_batch_norms
    done = read_results(options.results) if drawn else {}
    wanted = [(e, [d for d in options.dtypes if (e.zoo, e.name, d) not in done]) for e in entries]
    for entry, dtypes in tqdm([w for w in wanted if w[1]], unit="network", file=sys.stderr):
        for found in measure(entry, [getattr(torch, dtype) for dtype in dtypes], drawn=drawn):
            done[report.key(found)] = found
            tqdm.write(line(found), file=sys.stdout)
            sys.stdout.flush()
            if drawn:
                with options.results.open("a") as file:
                    file.write(json.dumps(found.record()) + "\n")

    measurements = [done[e.zoo, e.name, dtype] for e in entries for dtype in options.dtypes]
    worse = report.regressions(measurements, report.read_data(DOCS / "coverage.csv"))
    print(*(f"worse than published: {text}" for text in worse), sep="\n")
    whole = drawn and options.names == "*" and set(options.zoos) == set(ZOOS)
    whole = whole and set(options.dtypes) == set(report.LIMITS)
    if options.update and drawn:
        measurements = updated(measurements, done)
    if options.output or ((whole or options.update) and (options.publish or not worse)):
        write(options.output or DOCS, measurements)
    return 1 if worse else 0


def updated(
    measurements: Sequence[Measurement], done: dict[report.Key, Measurement]
) -> list[Measurement]:
    """Put measurements into the order of all networks, with the published ones for the rest."""
    old = {report.key(m): m for m in report.read_data(DOCS / "coverage.csv")}
    new = {report.key(m): m for m in measurements}
    found = {**old, **{key: m for key, m in done.items() if key in old}, **new}
    keys = [(e.zoo, e.name, d) for zoo in ZOOS for e in ZOOS[zoo]() for d in report.LIMITS]
    return [found[key] for key in keys if key in found]


def write(folder: Path, measurements: Sequence[Measurement]) -> None:
    """Write the page, the data and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write_data(folder / "coverage.csv", measurements)
    report.write_page(folder / "coverage.md", measurements, COMMAND, CALIBRATION)
    chart.draw(folder / "figures" / "coverage.png", measurements)


def read_results(path: Path) -> dict[report.Key, Measurement]:
    """Read what an earlier run with the same sources has measured."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [Measurement(**json.loads(text)) for text in lines]
    return {report.key(m): m for m in found if m.sources == sources()}


def line(found: Measurement) -> str:
    """Describe a measurement in one line."""
    start = f"{found.zoo:12s} {found.name:40s} {found.dtype:8s}"
    if found.failure:
        return f"{start} {found.failure}"
    mark = "" if report.explained(found) else "  <-- outside the limits"
    own = f", own rounding {found.rounding:.1e}" if found.dtype != "float64" else ""
    seconds = f", captured in {found.capture_seconds:.1f} s"
    return f"{start} {report.describe(found)}{own}{seconds}{mark}"


if __name__ == "__main__":
    sys.exit(main())
