"""The code of the first page that people try runs as it stands."""

import re
from pathlib import Path
from typing import Any

START = Path(__file__).parent.parent / "docs" / "start.md"


def test_five_minutes_run_as_they_stand() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", START.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    page: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(START), "exec"), page)
    assert page["values"].shape == (3, 4, 2)
