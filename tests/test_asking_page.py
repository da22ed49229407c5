"""The page about the ways to ask runs as it stands."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parent.parent / "docs" / "asking.md"


def test_every_block_of_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
