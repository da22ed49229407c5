"""The lines of docs/frameworks.md run, and the values add up."""

import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"


def test_the_page_runs():
    matplotlib.use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    page: dict[str, Any] = {"__name__": "frameworks_page"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's
        exec(compile("\n".join(blocks), str(PAGE), "exec"), page)
    assert page["by_token"].shape == (2, 5, 2)
    with torch.no_grad():
        logits = page["classifier"](page["ids"], attention_mask=page["mask"]).logits
    sums = (
        page["by_token"].sum(1)
        + page["explainer"](page["ids"], attention_mask=page["mask"]).base_values
    )
    np.testing.assert_allclose(sums, logits, rtol=0, atol=1e-5)


def test_explaining_takes_at_most_six_lines():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    explaining = [block for block in blocks if "DeepExplainer(" in block]
    assert len(explaining) == 4
    for block in explaining:
        lines = [x for x in block.splitlines() if x and not x.startswith(("import", "from"))]
        assert len(lines) <= 6
