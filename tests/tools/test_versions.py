"""The tables of releases: what was tried is what the files in ``tests/constraints`` say."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from fxshap._requirements import OLDEST, release_of
from tests.tools import versions
from tests.tools.pages import read_section
from tests.tools.versions import Outcome, read_rows, reason_rows, table, update_table

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "tests" / "constraints"


def releases(path: Path) -> dict[str, str]:
    """Return the releases that a file of constraints pins, by package."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", path.read_text(), re.MULTILINE))


def test_the_oldest_constraints_are_the_oldest_releases_that_are_accepted():
    pinned = releases(CONSTRAINTS / "oldest.txt")
    assert {name: release_of(pinned[name]) for name in OLDEST} == OLDEST


def test_every_file_of_constraints_has_a_command():
    makefile = (ROOT / "Makefile").read_text()
    (names,) = re.findall(r"^RELEASES := (.*)$", makefile, re.MULTILINE)
    assert set(names.split()) == {path.stem for path in CONSTRAINTS.glob("*.txt")}


@pytest.mark.parametrize("path", sorted(CONSTRAINTS.glob("*.txt")), ids=lambda path: path.stem)
def test_the_readme_has_the_releases_of_every_file(path):
    pinned = releases(path)
    readme = (ROOT / "README.md").read_text()
    assert re.search(
        rf"^\| `make test-{path.stem}` \| 3\.\d+ \| {' . '.join(pinned.values())} \|$",
        readme,
        re.MULTILINE,
    )


def test_every_result_is_of_releases_that_a_file_pins():
    pinned = [releases(path) for path in CONSTRAINTS.glob("*.txt")]
    columns = [versions.HEADER.index(name) for name in versions.PACKAGES]
    rows = read_rows(read_section(ROOT / "docs" / "versions.md", "results"))
    assert rows
    for row in rows:
        assert {name: row[k] for name, k in zip(versions.PACKAGES, columns, strict=True)} in pinned


def test_a_row_replaces_that_of_the_same_release(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\n<!-- end -->\nafter\n")
    header = ("torch", "passed")
    for release, passed in (("2.14.1", "1"), ("2.6.0", "2"), ("2.13.0+cpu", "3"), ("2.6.0", "4")):
        monkeypatch.setattr(versions, "version", lambda name, release=release: release)
        update_table(page, "results", header, [(release.partition("+")[0], passed)])
    rows = [("2.6.0", "4"), ("2.13.0", "3"), ("2.14.1", "1")]
    assert read_rows(read_section(page, "results")) == rows
    assert (
        page.read_text()
        == f"before\n<!-- results -->\n{table(header, rows)}\n<!-- end -->\nafter\n"
    )


def report(outcome: str, when: str = "call", reason: str = "") -> SimpleNamespace:
    """Return what pytest reports of a step of a test."""
    return SimpleNamespace(
        when=when,
        outcome=outcome,
        failed=outcome == "failed",
        skipped=outcome == "skipped",
        longrepr=("file", 1, f"Skipped: {reason}"),
        nodeid="tests/a.py::test[a|b]",
    )


def test_tests_are_counted_with_the_reasons_of_those_that_did_not_pass():
    outcome = Outcome()
    for step in ("setup", "call", "teardown"):
        outcome.pytest_runtest_logreport(report("passed", step))
    outcome.pytest_runtest_logreport(report("failed"))
    outcome.pytest_runtest_logreport(report("failed", "setup"))
    for _ in range(2):
        outcome.pytest_runtest_logreport(report("skipped", "setup", "no GPU"))
    outcome.pytest_collectreport(report("failed", "collect"))
    assert outcome.counts == {"passed": 1, "failed": 3, "skipped": 2}
    failed, skipped = (row[1:] for row in reason_rows(outcome))
    assert failed == ("3", "failed: tests/a.py::test[a/b]")
    assert skipped == ("2", "skipped: no GPU")
