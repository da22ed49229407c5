"""Format small tables, counts, shapes and dtypes, for terminals and notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Records = Sequence[Mapping[str, str]]


def text_table(records: Records, left: Sequence[str] = ()) -> str:
    """Return records as a table of plain text, with the columns in `left` aligned to the left."""
    import pandas as pd  # a dependency of SHAP; imported here because it takes seconds

    frame = pd.DataFrame(records)
    for column in left:
        width = max(map(len, [column, *frame[column]]))
        frame[column] = [cell.ljust(width) for cell in frame[column]]
        frame = frame.rename(columns={column: column.ljust(width)})
    lines = frame.to_string(index=False).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def html_table(records: Records) -> str:
    """Return records as an HTML table, for a notebook."""
    import pandas as pd

    table: str = pd.DataFrame(records).to_html(index=False, border=0, justify="left")
    return table


def pluralize(number: int, noun: str) -> str:
    """Return a number and a noun, which is in the plural unless the number is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def truncate(text: str, width: int) -> str:
    """Cut a text to `width` characters, including the ellipsis."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def format_shape(value: Tensor) -> str:
    """Return the sizes of a tensor, with ``*`` for a symbolic size: any number of rows."""
    return ", ".join("*" if isinstance(size, torch.SymInt) else str(size) for size in value.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module, such as ``float32``."""
    return str(dtype).removeprefix("torch.")
