"""Try every PyTorch operator that has a derivative, and write docs/operators.md.

``python -m benchmarks.coverage.operators`` makes a small model of each operator of PyTorch's own
test database, from its first small sample input, and explains it with SHAP. Verdicts are appended
to a file, so that a run that was stopped goes on where it was; ``--again`` tries those anew that
were not additive.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import shap
import torch
from tabulate import tabulate

from tests.tools.operators import OUTCOMES, Verdict, operator_database, verdicts
from tests.tools.pages import COMMIT

RESULTS = Path("benchmarks/coverage/operators.jsonl")
PAGE = Path("docs/operators.md")
COMMAND = "python -m benchmarks.coverage.operators"

MEANING = {
    "additive": "SHAP's values add up, and features that cannot matter get nothing",
    "refused": "fxshap raises an error that names the operator or the line",
    "no second point": "PyTorch has no small dense sample of it with another point nearby",
    "dummies": "the values add up, but a feature that cannot matter gets some",
    "not additive": "the values do not add up",
    "another error": "an error that is not fxshap's own",
}

TEXT = """# Which operators

{additive} of {all} operators of PyTorch that have a derivative are explained with values that add
up; {refused} are refused by name.

{table}

Each operator of PyTorch's test database (`torch.testing._internal`) is a model of its own: the
tensors that its first small sample input differentiates are computed from the features, one row
after another. There are one sample and at least two references. One output is a weighted sum of all
results, the other is a single one. The values add up if their sum differs from the change of the
output by at most 1e-9 of the largest output; the largest error is {largest}. A feature cannot
matter if none of several values, at any of four points, changes the single result. Its values count
as nothing below the same bound. An operator counts once, with its worst outcome.{untried}

{software}: `{command}`.

## All others

{others}
"""


def measure(results: Path, again: bool) -> list[Verdict]:
    """Return the verdicts of all operators; try those that have none yet."""
    known = read(results)
    if again:
        worse = {v.operator for v in known if v.outcome != "additive"}
        known = [v for v in known if v.operator not in worse]
        write(results, known)
    done = {v.operator for v in known}
    for info in operator_database():
        if info.full_name in done:
            continue
        found = verdicts(info, count=1) or [Verdict(info.full_name, "", "no second point")]
        print(*(f"{v.operator} {v.dtype} {v.outcome} {v.message}" for v in found), sep="\n")
        write(results, found, "a")
        known += found
    return known


def read(results: Path) -> list[Verdict]:
    """Return the verdicts in a file."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [Verdict(**json.loads(line)) for line in lines]


def write(results: Path, found: Iterable[Verdict], mode: str = "w") -> None:
    """Write verdicts to a file, one a line."""
    with results.open(mode) as file:
        file.writelines(json.dumps(asdict(verdict)) + "\n" for verdict in found)


# --- the page -------------------------------------------------------------------------------------


def page(found: Sequence[Verdict], untried: int) -> str:
    """Return the page about a list of verdicts, without those of some operators."""
    worst = {name: worst_outcome(v for v in found if v.operator == name) for name in names(found)}
    total = Counter(worst.values())
    by_dtype = Counter((v.dtype, v.outcome) for v in found)
    table = [
        [
            outcome,
            total[outcome],
            by_dtype["float64", outcome],
            by_dtype["complex128", outcome],
            MEANING[outcome],
        ]
        for outcome in OUTCOMES
    ]
    headers = ["outcome", "operators", "float64", "complex128", "meaning"]
    largest = max((v.error for v in found if v.outcome == "additive"), default=0.0)
    others = [
        [f"`{v.operator}`", v.dtype, v.outcome, remark(v)] for v in found if v.outcome != "additive"
    ]
    listed = tabulate(others, ["operator", "numbers", "outcome", "remark"], tablefmt="github")
    return TEXT.format(
        additive=total["additive"],
        all=len(worst),
        refused=total["refused"],
        table=tabulate(table, headers, tablefmt="github"),
        largest=f"{largest:.0e}",
        software=software(),
        command=COMMAND,
        others=listed,
        untried=f" {untried} others were not tried." if untried else "",
    )


def names(found: Iterable[Verdict]) -> list[str]:
    """Return the names of the operators in order."""
    return list(dict.fromkeys(v.operator for v in found))


def worst_outcome(found: Iterable[Verdict]) -> str:
    """Return the worst outcome of one operator."""
    return max((v.outcome for v in found), key=OUTCOMES.index)


#: Where a message places an operation, which is in the same model for all operators.
PLACE = r"\S*operators\.py:\d+"
WHERE = re.compile(rf", at {PLACE} \(`.*?`\)|at {PLACE} \(`.*?`\),? ?| \(\w+, {PLACE}\)")


def remark(verdict: Verdict) -> str:
    """Return what went wrong, short enough for a table."""
    if verdict.outcome in ("dummies", "not additive"):
        return f"{max(verdict.error, verdict.dummies):.0e}"
    text = WHERE.sub("", verdict.message).replace("|", "/").replace("`", "")
    return textwrap.shorten(text, 150, placeholder=" ...")


def software() -> str:
    """Return the date, the versions and the commit."""
    today = datetime.now(timezone.utc).date()
    python = sys.version.split()[0]
    return (
        f"{today}, Python {python}, torch {torch.__version__}, shap {shap.__version__}, "
        f"commit {COMMIT}"
    )


def main() -> None:
    """Try all operators and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="try again what was not additive")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-run", action="store_true", help="write the page of the results")
    arguments = parser.parse_args()
    run = not arguments.no_run
    found = measure(arguments.results, arguments.again) if run else read(arguments.results)
    PAGE.write_text(page(found, len(operator_database()) - len(names(found))))


if __name__ == "__main__":
    main()
