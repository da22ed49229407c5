"""The code of the first page that people try runs as it stands; the map has every file."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START = ROOT / "docs" / "start.md"


def test_five_minutes_run_as_they_stand() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", START.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    page: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(START), "exec"), page)
    assert page["values"].shape == (3, 4, 2)


def test_every_file_is_on_the_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    told = set(
        re.findall(r"`(\w+\.py)`", text[text.index("## The map") : text.index("## Add a rule")])
    )
    there = {path.name for path in (ROOT / "fxshap").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert told == there
