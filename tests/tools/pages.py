"""Figures in a page of the documentation, each section written by the command that measures it.

Every section names the commit that it was measured on. ``python -m tests.tools.stamps`` compares
the sources of that commit with the present ones.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def current_commit() -> str:
    """Return the commit of the code, with a plus sign if sources differ from it.

    Outside of a repository it is ``unknown``.
    """

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--", "fxshap", "tests", "benchmarks")
    except FileNotFoundError:  # git is not installed
        return "unknown"
    return commit + "+" * bool(changed) if commit else "unknown"


#: The commit of the code that runs, whatever is committed while it measures.
COMMIT = current_commit()
#: What a section of figures ends with.
STAMP = f"Measured on commit {COMMIT}."


def replace_section(page: Path, name: str, text: str, stamp: bool = True) -> None:
    """Put `text` between the comments ``<!-- name -->`` and ``<!-- end -->`` of a page.

    Parameters
    ----------
    page : Path
    name : str
    text : str
    stamp : bool
        Whether to add the commit that runs; False if the text has the commit of an earlier run.

    Raises
    ------
    ValueError
        If the page has no such section.
    """
    read_section(page, name)
    text = f"{text}\n\n{STAMP}" if stamp else text
    page.write_text(
        section(name).sub(lambda found: f"{found[1]}{text}\n{found[3]}", page.read_text())
    )


def read_section(page: Path, name: str) -> str:
    """Return the text between the comments ``<!-- name -->`` and ``<!-- end -->`` of a page.

    Raises
    ------
    ValueError
        If the page has no such section.
    """
    found = section(name).findall(page.read_text())
    if len(found) != 1:
        raise ValueError(f"{page} has {len(found)} sections '{name}'")
    text: str = found[0][1]
    return text


def section(name: str) -> re.Pattern[str]:
    """Return the pattern of a section: its first comment, its text and its last comment."""
    return re.compile(rf"(<!-- {re.escape(name)} -->\n)(.*?)(<!-- end -->)", re.DOTALL)
