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
    section = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    changed, count = section.subn(lambda found: f"{found[1]}{text}\n{found[2]}", page.read_text())
    if count != 1:
        raise ValueError(f"{page} has {count} sections '{name}'")
    page.write_text(changed)
