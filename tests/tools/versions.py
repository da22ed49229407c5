"""Run the tests that depend on SHAP with the installed versions, and print which they are.

``make newest`` runs it in an environment of its own, with the newest release of SHAP.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import re
import sys
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest

from tests.tools.pages import replace_section

TESTS = ["tests/integrations", "tests/end_to_end/test_networks.py"]


def main(arguments: list[str] | None = None) -> int:
    """Run the tests; return what pytest returns."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.versions", description=__doc__)
    parser.add_argument("--page", type=Path, help="write the outcome into this page")
    options = parser.parse_args(arguments)
    outcome = Outcome()
    code = int(pytest.main(["-q", "-n", "2", *TESTS], plugins=[outcome]))
    text = f"{versions()}: {outcome} ({datetime.date.today()})"
    print(text)
    if options.page:
        replace_section(options.page, "versions", text)
    return code


class Outcome:
    """Counts the tests by what came of them."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed or report.skipped:
            self.counts[report.outcome] += 1

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in self.counts.items())


def versions() -> str:
    """Name the releases that run, and the lowest of SHAP that fxshap allows."""
    needs = next(need for need in requires("fxshap") or [] if need.startswith("shap"))
    lowest = re.search(r">=\s*([\d.]+)", needs)
    assert lowest
    names = ", ".join(f"{name} {version(name)}" for name in ("shap", "torch", "numpy"))
    return f"{names}, Python {platform.python_version()} (fxshap allows shap from {lowest[1]})"


if __name__ == "__main__":
    sys.exit(main())
