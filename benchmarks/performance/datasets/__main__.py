"""Throughput, memory and starts of jobs that explain data sets.

``python -m benchmarks.performance.datasets --page docs/datasets.md`` runs a tabular network on
200,000 rows and an image network on 5,000 images: in one process, and with one and two workers of
Ray, in turns, each with one thread. A ratio is the median over neighbouring turns, since the speed
of a machine that others share changes from minute to minute. Two processes that share nothing, at
the same time, tell what two cores of the machine give. It exits with 1 if two workers are less
than 1.7 times as fast as one, or the memory of the driver or of a worker grows with the rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import ray
import torch
from tabulate import tabulate

from benchmarks.performance.datasets.runs import (
    Run,
    rate_of_two_processes,
    run_in_process,
    write_data,
)
from benchmarks.performance.datasets.simulate import Costs, simulate
from fxshap.datasets.parts import rows_per_part_of
from tests.tools.pages import COMMIT, replace_section

#: How much faster two workers are than one, at least.
LEAST_SPEEDUP = 1.7
#: Workers of the jobs in turn, and the part of the rows that they explain.
TURNS = ((0, 1), (1, 1), (2, 1), (2, 4), (2, 1), (1, 1), (0, 1), (1, 1), (2, 1), (2, 1), (1, 1))
#: How much more memory four times as many rows take, at most.
MOST_GROWTH = 1.15
#: What is assumed of the storage that all workers share, in bytes per second.
BANDWIDTH = 1e9
#: The bytes of the inputs of a sample.
ROW_BYTES = {"tabular": 30 * 4, "images": 3 * 32 * 32 * 4}
FIGURES = Path("build/datasets.json")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.performance.datasets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--from", dest="file", type=Path, help="figures of an earlier run")
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    options = parser.parse_args(arguments)
    if options.file:
        figures = json.loads(options.file.read_text())
    else:
        figures = measure({"tabular": options.rows, "images": options.images})
        FIGURES.parent.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps(figures, indent=2))
    runs = [Run(**run) for run in figures["runs"]]
    text, holds = report(runs, figures["pairs"], figures["part"], figures["machine"])
    print(text)
    if options.page:
        replace_section(options.page, "datasets", text, stamp=False)
    return int(not holds)


def measure(rows: Mapping[str, int]) -> dict[str, object]:
    """Run all jobs, each in a process of its own."""
    runs, pairs = [], {}
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        for name, count in rows.items():
            for workers, share in TURNS:
                write_data(folder, name, count // share)  # not in the process that is measured
                runs.append(asdict(run_in_process(folder, name, count // share, workers)))
                print(runs[-1], file=sys.stderr)
            pairs[name] = rate_of_two_processes(folder, name, count)
            print(f"{name}: {pairs[name]} samples/s of two processes", file=sys.stderr)
    command = [sys.executable, "-m", "benchmarks.performance.datasets.runs", "tasks"]
    part = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
    machine += f"torch {torch.__version__}, ray {ray.__version__}"
    return {
        "runs": runs,
        "pairs": pairs,
        "part": json.loads(part.splitlines()[-1]),
        "machine": f"{datetime.date.today()}, {machine}, commit {COMMIT}",
    }


def report(
    runs: list[Run], pairs: Mapping[str, float], part: float, machine: str
) -> tuple[str, bool]:
    """Return the tables, and whether what is promised holds."""
    sections, holds = [machine], True
    for name in dict.fromkeys(run.network for run in runs):
        there = [run for run in runs if run.network == name]
        rows = max(run.rows for run in there)
        full = {count: of_turns(there, count, rows) for count in (0, 1, 2)}
        quarter = next(run for run in there if run.rows < rows)
        speedups = ratios_of_turns(there, rows)
        speedup = statistics.median(speedups)
        growth = max(
            full[2].driver_bytes / quarter.driver_bytes,
            full[2].worker_bytes / quarter.worker_bytes,
        )
        holds = holds and speedup >= LEAST_SPEEDUP and growth <= MOST_GROWTH
        sections += [
            f"### {name.capitalize()}",
            table_of_runs([full[0], full[1], quarter, full[2]]),
            f"Two workers are {speedup:.2f} times as fast as one (at least {LEAST_SPEEDUP}; "
            f"{min(speedups):.2f} to {max(speedups):.2f} in {len(speedups)} pairs of turns), and "
            f"{full[2].rate / full[0].rate:.2f} times as fast as one process without Ray. Two "
            f"processes without Ray, which share nothing but the machine, are together "
            f"{pairs[name] / full[0].rate:.2f} times as fast as one. Four "
            f"times as many rows take at most {growth:.2f} times the memory (at most "
            f"{MOST_GROWTH}). A worker is ready after {full[2].first_part:.1f} s with its first "
            f"part, {full[2].build:.2f} s of which build the model and the explainer. A sample "
            f"takes {full[2].busy * 1e3:.3g} ms of a worker, and has {full[2].bytes_in:,.0f} bytes "
            f"on disk before and {full[2].bytes_out:,.0f} after. The largest additivity error is "
            f"{full[2].largest_error:.1e}.",
            table_of_simulations(full[2], part),
        ]
    return "\n\n".join(sections), holds


def of_turns(runs: list[Run], workers: int, rows: int) -> Run:
    """Return the run of the median rate, with that rate, of all turns of a job."""
    turns = [run for run in runs if (run.workers, run.rows) == (workers, rows)]
    rate = statistics.median(run.rate for run in turns)
    return replace(min(turns, key=lambda run: abs(run.rate - rate)), rate=rate)


def ratios_of_turns(runs: list[Run], rows: int) -> list[float]:
    """Return by how much two workers are faster than one, for each pair of neighbouring turns."""
    rates = {n: [run.rate for run in runs if (run.workers, run.rows) == (n, rows)] for n in (1, 2)}
    return [two / one for one, two in zip(rates[1], rates[2], strict=True)]


def table_of_runs(runs: list[Run]) -> str:
    """Return the table of the jobs of one network."""
    rows = [
        [
            f"{run.workers or 'no'} Ray worker{'s' if run.workers > 1 else ''}",
            f"{run.rows:,}",
            f"{run.seconds:.1f}",
            f"{run.first_part:.1f}",
            f"{run.rate:,.0f}",
            f"{run.driver_bytes / 2**20:,.0f}",
            f"{run.worker_bytes / 2**20:,.0f}",
        ]
        for run in runs
    ]
    headers = ["", "samples", "s", "s to the first parts", "samples/s then", "driver MiB",
               "worker MiB"]  # fmt: skip
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def table_of_simulations(run: Run, part: float) -> str:
    """Return the table of simulated jobs, from the figures of one that was measured."""
    costs = Costs(
        run.busy, run.spread, run.first_part, part, run.bytes_in + run.bytes_out, BANDWIDTH
    )
    rows = []
    for count in (10**6, 10**8):
        for workers in (10, 100, 1000):
            size = rows_per_part_of(count, ROW_BYTES[run.network], workers)
            outcome = simulate(costs, count, workers, size)
            rows.append(
                [
                    f"{count:,}",
                    f"{workers:,}",
                    f"{outcome.seconds:,.0f}",
                    f"{count / outcome.seconds:,.0f}",
                    f"{outcome.efficiency:.0%}",
                    outcome.bottleneck,
                ]
            )
    headers = ["samples", "workers", "s", "samples/s", "workers busy", "busiest"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return (
        f"Simulated, with {part * 1e3:.1f} ms of the driver per part and a storage of "
        f"{BANDWIDTH / 1e9:g} GB/s:\n\n{table}"
    )


if __name__ == "__main__":
    sys.exit(main())
