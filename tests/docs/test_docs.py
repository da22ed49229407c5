"""The code of the page "Five minutes" runs unchanged, and the map has every package and file."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
START = ROOT / "docs" / "start.md"


def test_five_minutes_run_as_they_stand() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", START.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    page: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(START), "exec"), page)
    assert page["values"].shape == (3, 4, 2)


def test_the_readme_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    code, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL).groups()
    exec(compile(code, "README.md", "exec"), {})
    figures = re.compile(r"\d\.\de[-+]\d\d")  # of rounding, which differs between machines
    assert figures.sub("#", capsys.readouterr().out) == figures.sub("#", shown)


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_every_package_and_file_is_on_the_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    part = text[text.index("## The map") : text.index("## Add a rule")]
    named = set(re.findall(r"^\| `([\w/]+(?:\.py|/))`", part, re.MULTILINE))
    package = ROOT / "fxshap"
    files = {path.name for path in package.glob("[a-z]*.py")}
    packages = {f"{path.parent.relative_to(package)}/" for path in package.glob("*/**/__init__.py")}
    assert named == files | packages
