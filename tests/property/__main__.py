"""Fuzz at length: ``python -m tests.property networks`` and ``python -m tests.property rules``.

Networks come in chunks, each drawn by Hypothesis from its own seed, the chunk's number. A chunk is
ten networks, since after ten Hypothesis begins to draw the same block several times in a network.
Every chunk goes to a file of results when it is done, so that a run that was stopped goes on where
it was, and parts of a run can be shared out with ``--first``. A network that fails is written down
as code that makes it again, and the run goes on; ``--shrink`` looks for the smallest of a chunk.

Cases of rules go to their file in the same way. ``--networks 0`` and ``--draws 0`` run nothing and
say what the file has.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tqdm import tqdm

from fxshap.testing.rule_check import EACH, TOLERANCE, Case
from tests.property.exactness import LIMIT, WORST_CONDITION, check_exact
from tests.property.extremes import check_draws, rows_of
from tests.property.networks import Data, Network
from tests.property.strategies import datasets, networks
from tests.rules.rule_cases import ALL
from tests.tools.pages import replace_section

PAGE = Path("docs/reliability.md")
RESULTS = "tests/property/results-{}.jsonl"
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Fuzz; return 1 if anything has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.property", description=__doc__)
    parser.add_argument("what", choices=["networks", "rules"])
    parser.add_argument("--networks", type=int, default=10_000)
    parser.add_argument("--chunk", type=int, default=10, help="networks of one seed")
    parser.add_argument("--first", type=int, default=0, help="the first chunk")
    parser.add_argument("--draws", type=int, default=100_000, help="of each case and dtype")
    parser.add_argument("--variances", action="store_true", help="explain with variances")
    parser.add_argument("--shrink", action="store_true", help="shrink what fails, in long time")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--page", type=Path, help="write the figures into this page")
    options = parser.parse_args(arguments)
    options.results = options.results or Path(RESULTS.format(options.what))
    torch.set_num_threads(1)
    gc.freeze()  # every capture collects garbage, and need not look at what has been imported
    if options.fresh:
        options.results.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        section = fuzz_networks(options) if options.what == "networks" else fuzz_rules(options)
    print(section.text)
    if options.page:
        replace_section(options.page, f"fuzzed {options.what}", section.text)
    return int(section.failed)


class Section:
    """What goes into the page, and whether anything has failed."""

    def __init__(self, text: str, failed: bool) -> None:
        self.text = f"{text} ({datetime.date.today()}, torch {torch.__version__})"
        self.failed = failed


# --- networks -------------------------------------------------------------------------------------


def fuzz_networks(options: argparse.Namespace) -> Section:
    """Run the chunks that are not in the results yet."""
    chunks = range(options.first, options.first + math.ceil(options.networks / options.chunk))
    done = {record["chunk"]: record for record in read(options.results)}
    waiting = [chunk for chunk in chunks if chunk not in done]
    with tqdm(total=len(chunks) * options.chunk, unit="network", smoothing=0) as bar:
        bar.update((len(chunks) - len(waiting)) * options.chunk)
        for chunk in waiting:
            done[chunk] = run_chunk(chunk, bar, options)
            with options.results.open("a") as file:
                file.write(json.dumps(done[chunk]) + "\n")
    found: Counter[str] = Counter()
    for record in done.values():
        found.update(record["found"])
    failures = failures_of(done.values())
    return Section(describe_networks(found, failures), bool(failures))


def read(path: Path) -> Iterable[Record]:
    """Read what an earlier run has found."""
    return map(json.loads, path.read_text().splitlines()) if path.exists() else ()


def run_chunk(chunk: int, bar: tqdm[Any], options: argparse.Namespace) -> Record:
    """Draw and check the networks of one seed; write down what fails, or shrink the first."""
    found: Counter[str] = Counter()
    failures: list[str] = []

    @seed(chunk)
    @settings(
        max_examples=options.chunk,
        phases=[Phase.generate, Phase.shrink] if options.shrink else [Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(networks(), st.lists(datasets(), min_size=3, max_size=3))
    def check(network: Network, data: list[Data]) -> None:
        found.update(networks=1)
        bar.update()
        try:
            found.update(check_exact(network, data, options.variances))
        except Exception as error:
            if options.shrink:
                raise
            failures.append(f"{type(error).__name__}: {error}\n{network}\n{data}")

    try:
        check()
        gc.freeze()  # what torch.export keeps of every network
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        failures.append("\n".join([f"{type(error).__name__}: {error}", *notes]))
    for failure in failures:
        tqdm.write(f"chunk {chunk}: {failure}")
    return {"chunk": chunk, "found": found, "failures": failures}


def describe_networks(found: Counter[str], failures: list[str]) -> str:
    """Say in a sentence what has been found."""
    asked = found["exact"]
    left_out = {k: found[k] for k in ("ill-conditioned", "overflow", "zero")}
    explained = asked + sum(left_out.values())
    return (
        f"{found['networks']:,} networks, {explained:,} sets of data: {asked:,} add up to {LIMIT}; "
        f"not asked for it are {left_out['ill-conditioned']:,} whose own output magnifies rounding "
        f"errors more than {WORST_CONDITION:,.0f} times, {left_out['overflow']:,} that compute NaN "
        f"or infinity or have a slope of more than 1e302, {left_out['zero']:,} whose outputs are "
        f"all 0 or denormal. {len(failures)} failures"
    )


# --- rules ----------------------------------------------------------------------------------------


def fuzz_rules(options: argparse.Namespace) -> Section:
    """Run the cases of rules that are not in the results yet, in both dtypes."""
    done = {record["case"]: record for record in read(options.results)}
    without_rows = sum(case.output_row is None for case in ALL)
    for number, case in enumerate(tqdm(ALL if options.draws else [], unit="rule")):
        name = f"{number} {case}"
        if name not in done:
            # A matrix product is one row a draw: all of them together are drawn as often as a case.
            share = without_rows if case.output_row is None else 1
            done[name] = {"case": name, **run_case(case, math.ceil(options.draws / share))}
            with options.results.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
    return Section(describe_rules(done.values()), bool(failures_of(done.values())))


def run_case(case: Case, draws: int) -> Record:
    """Draw for one case in both dtypes, until it fails."""
    record: Record = {"rows": 0, "excused": 0, "worst": {}, "failures": []}
    size = rows_of(case, 1000)
    batch = {EACH: 40 * size, None: 1}.get(case.output_row, size)
    for dtype in TOLERANCE:
        worst = 0.0
        for draw in range(math.ceil(draws / batch)):
            found = check_draws(case, dtype, size, draw)
            record["rows"] += found.rows
            record["excused"] += found.excused
            worst = max(worst, found.worst)
            if found.message:
                record["failures"].append(f"{dtype} seed {draw}: {found.message}")
                tqdm.write(record["failures"][-1][:1000])
                break
        record["worst"][str(dtype)[6:]] = worst
    return record


def describe_rules(records: Iterable[Record]) -> str:
    """Say in a sentence what has been found."""
    records = list(records)
    rows, excused = (sum(record[key] for record in records) for key in ("rows", "excused"))
    errors = ", ".join(
        f"{max(record['worst'][name] for record in records):.1e} in {name}"
        for name in records[0]["worst"]
    )
    return (
        f"{len(records)} of {len(ALL)} cases of rules, {rows:,} pairs of ends in float64 and "
        f"float32: largest additivity error {errors}; {excused:,} pairs excused. "
        f"{len(failures_of(records))} failures"
    )


def failures_of(records: Iterable[Record]) -> list[str]:
    """Return all failures."""
    return [failure for record in records for failure in record["failures"]]


if __name__ == "__main__":
    sys.exit(main())
