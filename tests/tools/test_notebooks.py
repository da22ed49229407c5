"""Faults of notebooks are found, before and while they run."""

import json

from tests.tools import notebooks

FIRST = "try:\n    import json\nexcept ImportError:\n    %pip install json\n"


def write(path, *cells):
    content = [{"cell_type": kind, "source": text.splitlines(True)} for kind, text in cells]
    path.write_text(json.dumps({"cells": content}))
    return path


def test_a_notebook_that_runs(tmp_path):
    path = write(
        tmp_path / "a.ipynb", ("code", FIRST), ("markdown", "# A"), ("code", "json.dumps(1)")
    )
    assert notebooks.faults(path) == [] and notebooks.run(path) == ""
    assert notebooks.main([str(tmp_path)]) == 0


def test_a_cell_that_fails(tmp_path):
    path = write(tmp_path / "a.ipynb", ("code", FIRST), ("code", "nothing"))
    assert "NameError" in notebooks.run(path)
    assert notebooks.main([str(tmp_path)]) == 1


def test_texts_that_a_notebook_does_not_render(tmp_path):
    text = "See :doc:`/limits`.\n\n.. literalinclude:: a.py"
    path = write(tmp_path / "a.ipynb", ("code", "1"), ("markdown", text))
    assert notebooks.faults(path) == [
        "a.ipynb: the first cell installs nothing",
        "a.ipynb: not rendered: :doc:`",
        "a.ipynb: not rendered: .. literalinclude::",
    ]


def test_a_folder_without_notebooks(tmp_path):
    assert notebooks.main([str(tmp_path)]) == 1
