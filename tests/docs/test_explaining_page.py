"""The lines of docs/explaining.md run."""

import re
import warnings
from pathlib import Path

import matplotlib

PAGE = Path(__file__).parents[2] / "docs" / "explaining.md"


def test_the_page_runs():
    matplotlib.use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == PAGE.read_text(encoding="utf-8").count("```python") > 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum's and matplotlib's
        exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "explaining_page"})
