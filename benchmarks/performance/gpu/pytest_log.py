"""A plugin of pytest that writes the outcome of every test at once, and can thin the tests out.

``FXSHAP_GPU_RESULTS`` is the folder of the results; of ``FXSHAP_GPU_EVERY`` tests of one function,
one is kept.
"""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from benchmarks.performance.results import Results

LENGTH = 160


def function_of(test: str) -> str:
    """Return the name of a test's function, without its parameters."""
    return test.split("::")[-1].partition("[")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep one of every so many tests of each function."""
    every = int(os.environ.get("FXSHAP_GPU_EVERY", "1"))
    groups = groupby(items, lambda item: function_of(item.nodeid))
    items[:] = [item for _, group in groups for item in list(group)[::every]]


class Log:
    """Writes a row for every test."""

    def __init__(self, folder: Path) -> None:
        self.results = Results(folder)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the outcome of a test: of its call, or of what failed or was skipped before it."""
        if report.when != "call" and report.outcome == "passed":
            return
        self.results.add(
            "correctness",
            group=function_of(report.nodeid).removeprefix("test_").replace("_", " "),
            test=report.nodeid.split("::")[-1],
            outcome=report.outcome,
            seconds=round(report.duration, 3),
            message=message(report) if report.outcome == "failed" else "",
        )

    def pytest_sessionfinish(self) -> None:
        """Write the tables with the last rows."""
        self.results.write_tables()


def message(report: Any) -> str:
    """Return the first line of what a failed test says."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return " ".join(text.split())[:LENGTH]


def pytest_configure(config: pytest.Config) -> None:
    """Log in the process that receives the reports of all others."""
    folder = os.environ.get("FXSHAP_GPU_RESULTS")
    if folder and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Log(Path(folder)))
