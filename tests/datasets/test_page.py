"""The lines of docs/datasets.md run, on fewer rows."""

import re
from pathlib import Path

import matplotlib
import pandas as pd

PAGE = Path(__file__).parents[2] / "docs" / "datasets.md"


def test_the_page_runs(ray, tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    code = "\n".join(blocks).replace("100_000", "2_000").replace("__name__ ==", "True or")
    page = {}
    exec(compile(code, str(PAGE), "exec"), page)
    assert capsys.readouterr().out.startswith("2000 1 row 17 (id customer 17)\n")
    assert page["values"].shape == (2000, 20, 2)
    assert isinstance(page["explained"], pd.DataFrame)
    assert len(page["explained"]["shap_values"][0]) == 20
