"""The code of the page "Five minutes" runs unchanged, and the map has every package and file."""

import re
from pathlib import Path
from typing import Any

import pytest

import fxshap
from tests.tools.release import readme_example, without_rounding

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
    code, shown = readme_example((ROOT / "README.md").read_text())
    exec(compile(code, "README.md", "exec"), {})
    assert without_rounding(capsys.readouterr().out) == without_rounding(shown)


def test_the_citation_has_the_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == fxshap.__version__
    assert re.search(r"^date-released: \d{4}-\d\d-\d\d$", text, re.MULTILINE)


def test_every_command_of_contributors_exists() -> None:
    commands = re.findall(
        r"^\| `make ([\w.-]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w. -]+):", makefile, re.MULTILINE))
    names = {name for target in targets for name in target.split()} | {"test-oldest"}
    assert set(commands) <= names and {"quick", "release"} <= set(commands)


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
