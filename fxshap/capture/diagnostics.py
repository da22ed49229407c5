"""Error messages for models that cannot be captured."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from fxshap.graph.provenance import UNKNOWN_LINE, is_user_file

#: The error of torch.export against which no other way to export helps.
DECISION = "GuardOnDataDependentSymNode"


#: By what is said in the error or in what caused it.
REMEDIES = {
    DECISION: (
        "it decides by the value of a tensor (an `if`, a loop or `.item()`), so no single graph "
        "describes it; choose with torch.where, leave out an `if mask.any():` that only saves "
        "time, or explain the part after the decision"
    ),
    ".numpy() is not supported": (
        "it leaves PyTorch for NumPy, where no operation is recorded; do the same with torch"
    ),
}


def find_remedy(error: BaseException) -> str | None:
    """Return what to do about an error, if we know."""
    said = [f"{type(cause).__name__}: {cause}" for cause in exception_chain(error)]
    known = (text for mark, text in REMEDIES.items() if any(mark in line for line in said))
    return next(known, None)


def explain_failure(error: BaseException) -> str:
    """Say which of the user's lines cannot be captured, why, and what to do."""
    where = innermost_user_line(error.__traceback__)
    remedy = find_remedy(error) or f"torch.export says: {first_line(error)}"
    return f"the model cannot be captured as one graph: at {where}, {remedy}"


def exception_chain(error: BaseException | None) -> list[BaseException]:
    """Return an exception and its causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def innermost_user_line(trace: TracebackType | None) -> str:
    """Return the innermost of the user's lines in a traceback: ``file:line (`code`)``."""
    frames = [frame for frame in traceback.extract_tb(trace) if is_user_file(frame.filename)]
    if not frames:
        return UNKNOWN_LINE
    return f"{frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)"


class DataDependentError(Exception):
    """A decision by the value of a tensor; torch.export prints its graph with a RuntimeError."""


@contextmanager
def convert_data_dependent_errors() -> Iterator[None]:
    """Raise what torch.export says of a decision as :class:`Undecided`, from the user's line."""
    try:
        yield
    except RuntimeError as error:
        if "data-dependent" not in str(error):
            raise
        raise DataDependentError(str(error)).with_traceback(error.__traceback__) from error
