"""Small tables, counts and shapes, for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Records = Sequence[Mapping[str, str]]


def text_table(records: Records, left: Sequence[str] = ()) -> str:
    """Return records as lines of plain text, the columns in `left` aligned to the left."""
    import pandas as pd  # SHAP brings it, and takes as long to import

    frame = pd.DataFrame(records)
    for column in left:
        width = max(map(len, [column, *frame[column]]))
        frame[column] = [cell.ljust(width) for cell in frame[column]]
        frame = frame.rename(columns={column: column.ljust(width)})
    lines = frame.to_string(index=False).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def html_table(records: Records) -> str:
    """Return records as a table for a notebook."""
    import pandas as pd

    table: str = pd.DataFrame(records).to_html(index=False, border=0, justify="left")
    return table


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shorten(text: str, width: int) -> str:
    """Cut a text to so many columns, an ellipsis included."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def shape_of(value: Tensor) -> str:
    """Return the sizes of a tensor, ``*`` for what is symbolic: any number of rows."""
    return ", ".join("*" if isinstance(size, torch.SymInt) else str(size) for size in value.shape)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a type without its module."""
    return str(dtype).removeprefix("torch.")
