"""Run the tests that depend on releases with the installed ones, and record what came of them.

``make test-oldest`` runs it in an environment of ``tests/constraints/oldest.txt``, and so on.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tabulate import tabulate

from tests.tools.pages import COMMIT, read_section, replace_section

#: Captures, requests, layers, networks, rules and tapes.
TESTS = (
    "tests/test_requirements.py",
    "tests/test_compat.py",
    "tests/capture",
    "tests/integrations",
    "tests/passes",
    "tests/rules",
    "tests/autograd/test_tape.py",
    "tests/end_to_end/test_networks.py",
    "tests/end_to_end/test_quiet.py",
)
#: The packages whose releases differ. The first names the row.
PACKAGES = ("torch", "numpy", "shap", "captum", "tangermeme")
HEADER = ("torch", "Python", *PACKAGES[1:], "passed", "failed", "skipped", "date", "commit")
REASONS_HEADER = ("torch", "tests", "outcome")


def main(arguments: list[str] | None = None) -> int:
    """Run the tests; return what pytest returns."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.versions", description=__doc__)
    parser.add_argument("--page", type=Path, help="write the outcome into the tables of this page")
    options, pytest_arguments = parser.parse_known_args(arguments)
    outcome = Outcome()
    code = int(pytest.main(["-q", *TESTS, *pytest_arguments], plugins=[outcome]))
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return code  # pytest did not run all tests
    row, reasons = result_row(outcome, COMMIT), reason_rows(outcome)
    print(table(HEADER, [row]), table(REASONS_HEADER, reasons), sep="\n\n")
    if options.page:
        update_table(options.page, "results", HEADER, [row])
        update_table(options.page, "reasons", REASONS_HEADER, reasons)
    return code


class Outcome:
    """Counts the tests by what came of them, and the reasons of those that did not run."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self.reasons = Counter[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed or report.skipped:
            self.counts[report.outcome] += 1
        if report.failed:
            self.reasons[f"failed: {report.nodeid}"] += 1
        elif report.skipped:
            text = report.longrepr[2]  # of (file, line, text)
            self.reasons[f"skipped: {text.removeprefix('Skipped: ')}"] += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.reasons[f"failed: {report.nodeid}"] += 1


def result_row(outcome: Outcome, commit: str) -> tuple[str, ...]:
    """Return the releases that ran, how many tests passed, failed and were skipped, and when."""
    torch_release, *others = (version(name).partition("+")[0] for name in PACKAGES)
    counts = (f"{outcome.counts[name]:,}" for name in ("passed", "failed", "skipped"))
    date = str(datetime.date.today())
    return torch_release, platform.python_version(), *others, *counts, date, commit


def reason_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """Return how many tests failed or were skipped, for every reason."""
    release = version(PACKAGES[0]).partition("+")[0]
    reasons = sorted(outcome.reasons.items())
    return [(release, str(count), reason.replace("|", "/")) for reason, count in reasons]


# --- tables of the page -------------------------------------------------------------------------


def update_table(
    page: Path, section: str, header: tuple[str, ...], rows: list[tuple[str, ...]]
) -> None:
    """Replace the rows of the installed release of PyTorch in a table, sorted by release."""
    release = version(PACKAGES[0]).partition("+")[0]
    others = [row for row in read_rows(read_section(page, section)) if row[0] != release]
    ordered = sorted([*others, *rows], key=lambda row: [int(x) for x in row[0].split(".")])
    replace_section(page, section, table(header, ordered), stamp=False)


def read_rows(text: str) -> list[tuple[str, ...]]:
    """Return the rows of a Markdown table, without its header."""
    lines = text.splitlines()[2:]
    return [tuple(re.split(r"\s*\|\s*", line.strip())[1:-1]) for line in lines]


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return rows as a Markdown table."""
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
