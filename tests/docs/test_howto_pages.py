"""The code of the pages that answer one question each runs, in the order of the page."""

import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    path
    for folder in ("howto", "moving", "")
    for path in (DOCS / folder).glob("*.md")
    if path.parent != DOCS or path.name in ("faq.md", "references.md")
)


def blocks(text: str) -> list[str]:
    """Return the Python code of a page, also that in lists."""
    found = re.findall(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        for code in blocks(page.read_text(encoding="utf-8")):
            exec(compile(code, str(page), "exec"), names)
    assert not list(tmp_path.iterdir())
