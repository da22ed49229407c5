"""Long fuzzing runs: ``python -m tests.property networks`` and ``python -m tests.property rules``.

Hypothesis draws networks in chunks, and the number of a chunk is its seed. A chunk has ten
networks, because after ten Hypothesis begins to repeat blocks within a network. The results of each
chunk are appended to a file, so that a run that was stopped continues there, and a long run can be
divided with ``--first``. A network that fails is recorded as code that builds it again, and the run
continues; ``--shrink`` finds the smallest failing network of a chunk.

Results of rules are appended to a file in the same way. ``--networks 0`` and ``--draws 0`` run
nothing and summarize the file.
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

from fxshap.testing import rule_check
from fxshap.testing.rule_check import EACH, Case
from tests.property.exactness import MAX_CONDITION, TOLERANCE, check_exact
from tests.property.extremes import DRAWN, check_draws, max_rows
from tests.property.networks import Data, Network
from tests.property.strategies import datasets, networks
from tests.tools.pages import replace_section

PAGE = Path("docs/reliability.md")
RESULTS = "tests/property/results-{}.jsonl"
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; return 1 if anything has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.property", description=__doc__)
    parser.add_argument("what", choices=["networks", "rules"])
    parser.add_argument("--networks", type=int, default=10_000)
    parser.add_argument("--chunk", type=int, default=10, help="networks of each seed")
    parser.add_argument("--first", type=int, default=0, help="the first chunk")
    parser.add_argument("--draws", type=int, default=100_000, help="rows of each case and dtype")
    parser.add_argument("--variances", action="store_true", help="explain with the variance rule")
    parser.add_argument("--shrink", action="store_true", help="shrink failing networks (slow)")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--fresh", action="store_true", help="delete earlier results")
    parser.add_argument("--page", type=Path, help="write the summary into this page")
    options = parser.parse_args(arguments)
    options.results = options.results or Path(RESULTS.format(options.what))
    torch.set_num_threads(1)
    gc.freeze()  # every capture collects garbage, and can skip the imported modules
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
    """The summary for the page, and whether anything has failed."""

    def __init__(self, text: str, failed: bool) -> None:
        self.text = f"{text} ({datetime.date.today()}, torch {torch.__version__})"
        self.failed = failed


# --- networks -------------------------------------------------------------------------------------


def fuzz_networks(options: argparse.Namespace) -> Section:
    """Run the chunks that are not in the results yet, and summarize all."""
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
    """Read the results of an earlier run."""
    return map(json.loads, path.read_text().splitlines()) if path.exists() else ()


def run_chunk(chunk: int, bar: tqdm[Any], options: argparse.Namespace) -> Record:
    """Draw and check the networks of one seed; record all failures, or shrink the first."""
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
        gc.freeze()  # the objects of every network that torch.export caches
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        failures.append("\n".join([f"{type(error).__name__}: {error}", *notes]))
    for failure in failures:
        tqdm.write(f"chunk {chunk}: {failure}")
    return {"chunk": chunk, "found": found, "failures": failures}


def describe_networks(found: Counter[str], failures: list[str]) -> str:
    """Return a sentence with the outcomes of all networks."""
    exact = found["exact"]
    excused = {k: found[k] for k in ("ill-conditioned", "overflow", "zero")}
    explained = exact + sum(excused.values())
    return (
        f"{found['networks']:,} networks, {explained:,} sets of data: {exact:,} add up to "
        f"{TOLERANCE}; not required of {excused['ill-conditioned']:,} whose own output magnifies "
        f"rounding errors more than {MAX_CONDITION:,.0f} times, of {excused['overflow']:,} that "
        "compute NaN or infinity or have a slope of more than 1e302, and of "
        f"{excused['zero']:,} whose outputs are all 0 or denormal. {len(failures)} failures"
    )


# --- rules ----------------------------------------------------------------------------------------


def fuzz_rules(options: argparse.Namespace) -> Section:
    """Run the cases of rules that are not in the results yet, and summarize all."""
    done = {record["case"]: record for record in read(options.results)}
    without_rows = sum(case.output_row is None for case in DRAWN)
    for number, case in enumerate(tqdm(DRAWN if options.draws else [], unit="rule")):
        name = f"{number} {case}"
        if name not in done:
            # A draw of a matrix product is one row. All these cases together have as many draws as
            # one other case.
            share = without_rows if case.output_row is None else 1
            done[name] = {"case": name, **run_case(case, math.ceil(options.draws / share))}
            with options.results.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
    return Section(describe_rules(done.values()), bool(failures_of(done.values())))


def run_case(case: Case, draws: int) -> Record:
    """Draw rows of one case in both dtypes, until it fails."""
    record: Record = {"rows": 0, "excused": 0, "worst": {}, "failures": []}
    size = max_rows(case, 1000)
    batch = {EACH: 40 * size, None: 1}.get(case.output_row, size)
    for dtype in rule_check.TOLERANCE:
        worst = 0.0
        for draw in range(math.ceil(draws / batch)):
            result = check_draws(case, dtype, size, draw)
            record["rows"] += result.rows
            record["excused"] += result.excused
            worst = max(worst, result.largest_error)
            if result.failure:
                record["failures"].append(f"{dtype} seed {draw}: {result.failure}")
                tqdm.write(record["failures"][-1][:1000])
                break
        record["worst"][str(dtype)[6:]] = worst
    return record


def describe_rules(records: Iterable[Record]) -> str:
    """Return a sentence with the results of all cases."""
    records = list(records)
    rows, excused = (sum(record[key] for record in records) for key in ("rows", "excused"))
    errors = ", ".join(
        f"{max(record['worst'][name] for record in records):.1e} in {name}"
        for name in records[0]["worst"]
    )
    return (
        f"{len(records)} of {len(DRAWN)} cases of rules, {rows:,} pairs of endpoints in float64 "
        f"and float32: largest additivity error {errors}; {excused:,} pairs excused. "
        f"{len(failures_of(records))} failures"
    )


def failures_of(records: Iterable[Record]) -> list[str]:
    """Return the failures of all records."""
    return [failure for record in records for failure in record["failures"]]


if __name__ == "__main__":
    sys.exit(main())
