"""Every exception is exported, and has one section on the page of errors."""

import ast
import re
from pathlib import Path

import pytest

import fxshap
from fxshap import errors

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
EXCEPTIONS = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, fxshap.FxshapError)
]


@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda error: error.__name__)
def test_an_exception_is_exported_and_on_the_page(error):
    assert error.__name__ in fxshap.__all__
    headings = [line for line in PAGE.read_text().splitlines() if line.startswith("## ")]
    assert sum(f"`{error.__name__}`" in line for line in headings) == 1


def literals() -> set[str]:
    """Return the texts in the source of the library, without what is filled in."""
    trees = [ast.parse(file.read_text()) for file in Path(fxshap.__file__).parent.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [node.value for node in nodes if isinstance(node.value, str)]
    return {part for text in texts for part in re.split(r"\{\w*\}|\n", text) if len(part) > 5}


def test_messages_on_the_page_are_those_of_the_library():
    """Most of a message is a text of the source; the rest is the user's model and lines."""
    messages = [line[4:] for line in PAGE.read_text().splitlines() if line.startswith("    ")]
    parts = literals()
    assert len(messages) > 20
    for message in (text for text in messages if len(text) > 60):
        known = {
            position
            for part in parts
            for found in re.finditer(re.escape(part), message)
            for position in range(*found.span())
        }
        users = sum(len(text) for text in re.findall(r"at \S+\.py:\d+ \(`.*`\)", message))
        assert len(known) >= 0.6 * (len(message) - users), message
