"""The program that finds words of the private language."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.house_words import main


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("code.py", "x = 1\nendsOfRow = walk_back(x)\n", ["2: endsOfRow", "2: walk_back"]),
        ("code.py", "# computed side\n# by side\n", ["1: side # by side"]),
        ("code.py", '"""It lets\n\nand knows."""\n', ["1: lets", "3: knows"]),
        ("code.py", "in_place = ast.walk(tree)  # in place, requires_grad\n", []),
        ("code.py", "def replaced(): pass  # replaced by a placeholder\n", []),
        ("page.md", "Both ends.\n\nThe error lets you [see](ends.md) `ends`.\n", ["1: ends"]),
    ],
)
def test_words_are_listed_with_their_lines(
    name: str, text: str, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert main([str(file)]) == bool(lines)
    printed = capsys.readouterr().out.split("\n")
    prefix = f"{file}:"
    listed = [line.removeprefix(prefix) for line in printed if line.startswith(prefix)]
    assert [line.rsplit(":", 1)[0] for line in listed] == lines
