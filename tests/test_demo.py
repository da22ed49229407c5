"""The demo runs, prints its measurements, and saves its picture."""

import re
import sys

from fxshap import demo


def test_demo_measures_both_and_saves_a_picture(tmp_path, capsys):
    picture = tmp_path / "digits.png"

    assert demo.main(["--output", str(picture)]) == 0

    printed = capsys.readouterr().out
    assert "AssertionError: The SHAP explanations do not sum up" in printed
    stock, ours = map(float, re.findall(r"additivity error: (\S+)", printed))
    assert stock > 1e-2
    assert ours <= 1e-5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_names_a_missing_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert demo.main([]) == 1

    assert "matplotlib" in capsys.readouterr().err
