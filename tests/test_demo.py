"""The demo runs, prints its measurements, and saves its picture."""

import re
import sys

from fxshap.demo.run import main


def test_demo_measures_both_and_saves_a_picture(tmp_path, capsys):
    picture = tmp_path / "digits.png"

    assert main(["--output", str(picture)]) == 0

    printed = capsys.readouterr().out
    assert "AssertionError: The SHAP explanations do not sum up" in printed
    assert "values (100, 1, 8, 8, 10), base values (100, 10)" in printed
    stock, ours = map(float, re.findall(r"additivity error: (\S+)", printed))
    assert stock > 1e-2
    assert ours <= 1e-5
    for path in (picture, tmp_path / "digits_before_after.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_demo_names_a_missing_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert main([]) == 1

    assert "matplotlib" in capsys.readouterr().err
