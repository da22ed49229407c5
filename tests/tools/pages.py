"""Figures in a page of the documentation, each section written by the command that measures it."""

import re
from pathlib import Path


def replace_section(page: Path, name: str, text: str) -> None:
    """Put `text` between the comments ``<!-- name -->`` and ``<!-- end -->`` of a page.

    Raises
    ------
    ValueError
        If the page has no such section.
    """
    read_section(page, name)
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
