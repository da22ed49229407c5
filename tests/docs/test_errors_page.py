"""Every exception is exported, and has one section on the page of errors."""

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
