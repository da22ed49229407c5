"""Say which figures in the documentation are older than the sources that they depend on.

Every section of figures names the commit that it was measured on. ``python -m tests.tools.stamps``
prints a line for every section whose sources have other statements now; comments, docstrings and
imports do not count. ``--strict`` exits with 1 if there is one, as ``make release`` does.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.tools.sources import digest_of

DOCS = Path("docs")
#: What computes attributions. The command line, reports and the demo change no figure.
CORE = tuple(
    f"fxshap/{name}"
    for name in (
        *("autograd", "capture", "frontend", "graph", "integrations", "ops", "passes", "rules"),
        *("runtime", "calls.py", "module.py", "state.py"),
    )
)
MAKERS = {
    "fidelity": ("tests/networks", "benchmarks/accuracy"),
    "refinement": ("tests/networks", "benchmarks/accuracy", "benchmarks/performance/refinement.py"),
    "speed": ("fxshap/explainer.py", "benchmarks/performance"),
    "datasets": ("fxshap/explainer.py", "fxshap/datasets", "benchmarks/performance/datasets"),
    "gpu": ("fxshap/explainer.py", "benchmarks/performance/gpu"),
    "coverage": ("benchmarks/coverage",),
    "operators": ("benchmarks/coverage/operators.py",),
    "reliability": ("tests/networks", "tests/property"),
    "versions": ("fxshap",),
    "limits": ("benchmarks/performance/capture.py",),
}
#: A commit in the text, or in the last column of a table.
COMMIT = re.compile(r"\bcommit ([0-9a-f]{7,40})\b|\| ([0-9a-f]{7,40})\+? +\|$", re.MULTILINE)
SECTION = re.compile(r"<!-- (?!end -->)([\w ]+) -->\n(.*?)<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Figures:
    """A page, or a section of one, with figures.

    Attributes
    ----------
    page : str
        The name of the page, without its suffix.
    section : str
        The name of the section; empty for a page that is written as a whole.
    commits : tuple of str
        The commits that it was measured on; none if it does not say.
    """

    page: str
    section: str
    commits: tuple[str, ...]

    def __str__(self) -> str:
        name = f"{DOCS / self.page}.md"
        return f"{name}, {self.section}" if self.section else name


def figures_of(page: str, text: str) -> list[Figures]:
    """Return the sections of a page that have figures, or the page if it has no sections."""
    sections = [(name, body) for name, body in SECTION.findall(text) if re.search(r"\d", body)]
    if not SECTION.search(text):
        sections = [("", text)]
    return [
        Figures(page, name, tuple(one or other for one, other in COMMIT.findall(body)))
        for name, body in sections
        if name != "reasons"  # of the results in the section before
    ]


def stale(figures: Figures) -> list[str]:
    """Return why figures may be out of date, a line for each reason."""
    if not figures.commits:
        return [f"{figures}: it does not name the commit that it was measured on"]
    paths = (*CORE, *MAKERS[figures.page])
    lines = []
    for commit in dict.fromkeys(figures.commits):
        measured = digest_at(commit, paths)
        if measured is None:
            lines.append(f"{figures}: commit {commit} is not in this repository")
        elif measured != digest_at("HEAD", paths):
            count = git("rev-list", "--count", f"{commit}..HEAD", "--", *paths).decode().strip()
            lines.append(
                f"{figures}: measured on commit {commit}; {count} later commits changed its sources"
            )
    return lines


@cache
def digest_at(commit: str, paths: tuple[str, ...]) -> str | None:
    """Return the digest of the Python files below paths at a commit; None without that commit."""
    try:
        names = git("ls-tree", "-r", "--name-only", commit, "--", *paths).decode().split()
    except subprocess.CalledProcessError:
        return None
    python = [name for name in names if name.endswith(".py")]
    if not python:  # of a time when the files had other paths
        return "none"
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "--", *python))) as archive:
        files = [archive.extractfile(member) for member in archive if member.isfile()]
        return digest_of(file.read().decode() for file in files if file)


def git(*command: str) -> bytes:
    """Return what a command of git prints."""
    return subprocess.run(["git", *command], capture_output=True, check=True).stdout


def main(arguments: list[str] | None = None) -> int:
    """Print what is out of date; return 1 if there is anything and the check is strict."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.stamps", description=__doc__)
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a page is stale")
    options = parser.parse_args(arguments)
    pages = [(page, (DOCS / f"{page}.md")) for page in MAKERS]
    lines = [
        line
        for page, path in pages
        if path.exists()
        for figures in figures_of(page, path.read_text())
        for line in stale(figures)
    ]
    kind = "Error" if options.strict else "Warning"
    print(*(f"{kind}: {line}" for line in lines), sep="\n", file=sys.stderr)
    return int(options.strict and bool(lines))


if __name__ == "__main__":
    sys.exit(main())
