"""Fuzz at length: ``python -m tests.fuzzing networks`` and ``python -m tests.fuzzing rules``.

Networks come in chunks, each drawn by Hypothesis from its own seed, the chunk's number. A chunk is
ten networks, since after ten Hypothesis begins to draw the same block several times in a network.
Every chunk goes to a file of results when it is done, so that a run that was stopped goes on where
it was, and parts of a run can be shared out with ``--first``. A network that fails is written down
as code that makes it again, and the run goes on; ``--shrink`` looks for the smallest of a chunk.
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

from benchmarks.page import replace_section
from fxshap.cases import EACH, TOLERANCE
from tests.fuzzing.exactness import LIMIT, WORST_CONDITION, check_exact
from tests.fuzzing.extremes import check_draws, rows_of
from tests.fuzzing.networks import Data, Network
from tests.fuzzing.strategies import datasets, networks
from tests.rule_cases import ALL

PAGE = Path("docs/reliability.md")
RESULTS = Path("tests/fuzzing/results.jsonl")
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Fuzz; return 1 if anything has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("what", choices=["networks", "rules"])
    parser.add_argument("--networks", type=int, default=10_000)
    parser.add_argument("--chunk", type=int, default=10, help="networks of one seed")
    parser.add_argument("--first", type=int, default=0, help="the first chunk")
    parser.add_argument("--draws", type=int, default=100_000, help="of each rule and dtype")
    parser.add_argument("--shrink", action="store_true", help="shrink what fails, in long time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--page", type=Path, help="write the figures into this page")
    options = parser.parse_args(arguments)
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
            done[chunk] = run_chunk(chunk, options.chunk, bar, options.shrink)
            with options.results.open("a") as file:
                file.write(json.dumps(done[chunk]) + "\n")
    records = [done[chunk] for chunk in chunks]
    found: Counter[str] = Counter()
    for record in records:
        found.update(record["found"])
    failures = [failure for record in records for failure in record["failures"]]
    return Section(describe_networks(found, failures), bool(failures))


def read(path: Path) -> Iterable[Record]:
    """Read what an earlier run has found."""
    return map(json.loads, path.read_text().splitlines()) if path.exists() else ()


def run_chunk(chunk: int, size: int, bar: tqdm[Any], shrink: bool = False) -> Record:
    """Draw and check the networks of one seed; write down what fails, or shrink the first."""
    found: Counter[str] = Counter()
    failures: list[str] = []

    @seed(chunk)
    @settings(
        max_examples=size,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
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
            found.update(check_exact(network, data))
        except Exception as error:
            if shrink:
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
    """Draw for every rule in both dtypes."""
    rows, excused, failures = 0, 0, []
    worst = dict.fromkeys(TOLERANCE, 0.0)
    for case in tqdm(ALL, unit="rule"):
        size = rows_of(case, 1000)
        batch = {EACH: 40 * size, None: 1}.get(case.output_row, size)
        for dtype in TOLERANCE:
            for draw in range(math.ceil(options.draws / batch)):
                found = check_draws(case, dtype, size, draw)
                rows, excused = rows + found.rows, excused + found.excused
                worst[dtype] = max(worst[dtype], found.worst)
                if found.message:
                    failures.append(f"{dtype} seed {draw}: {found.message}")
                    tqdm.write(failures[-1][:1000])
                    break
    errors = ", ".join(f"{error:.1e} in {str(dtype)[6:]}" for dtype, error in worst.items())
    text = (
        f"{len(ALL)} cases of rules, {rows:,} pairs of ends in float64 and float32: largest "
        f"additivity error {errors}; {excused:,} pairs excused. {len(failures)} failures"
    )
    return Section(text, bool(failures))


if __name__ == "__main__":
    sys.exit(main())
