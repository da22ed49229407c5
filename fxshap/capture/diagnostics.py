"""Error messages for models that cannot be captured: which line, why, and what to do."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from fxshap.graph.provenance import Line, user_line

#: The errors of torch.export for control flow that depends on values. No strategy avoids them.
DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "DataDependentOutputException")

#: What to do about a decision by the values of the explained inputs.
DECIDES = (
    "it decides by the value of a tensor (an `if`, a loop or `.item()`), so no single graph "
    "describes it; choose with torch.where, leave out an `if mask.any():` that only saves "
    "time, or explain the part after the decision"
)

#: What to do about a number that depends on the explained inputs and enters the computation.
TAKES_NUMBER = (
    "it takes a number out of a tensor (`float()`, `int()`, `.item()`, `.numpy()`, a product with "
    "an array, or a loop), so no single graph describes it; choose with torch.where, or compute "
    "with tensors (`torch.as_tensor(array)`)"
)

#: The error of torch for outputs whose sizes depend on values, where it cannot name them.
DYNAMIC_SIZE = "DynamicOutputShapeException"
#: The error of torch for tensors that leave it for NumPy.
LEAVES_FOR_NUMPY = ".numpy() is not supported"

#: What to do, by a part of the error's text or of the text of one of its causes.
REMEDIES = {
    **dict.fromkeys(DATA_DEPENDENT, DECIDES),
    LEAVES_FOR_NUMPY: (
        "it leaves PyTorch for NumPy, where no operation is recorded; do the same with torch"
    ),
}


#: What to do about a solver that chooses its steps by the values.
ADAPTIVE_STEPS = (
    "the solver chooses its steps by the values, so no single graph describes it; give it fixed "
    "steps, as in torchdiffeq.odeint(..., method='rk4', options={'step_size': 0.1})"
)
#: Methods of torchdiffeq's solvers with adaptive steps, which those with fixed steps have not.
ADAPTIVE_METHODS = ("_before_integrate", "_adaptive_step")


def explain_failure(error: BaseException) -> str:
    """Return a message that names the user's line that cannot be captured, why, and what to do."""
    line = innermost_user_line(error.__traceback__)
    if has_adaptive_steps(error):
        return not_one_graph(line, ADAPTIVE_STEPS)
    remedy = find_remedy(error) or f"torch.export reports: {first_line(error)}"
    return not_one_graph(line, remedy)


def not_one_graph(line: str, reason: str) -> str:
    """Return the message that a line of the user's cannot be captured."""
    return f"the model cannot be captured as one graph: at {line}, {reason}"


def find_remedy(error: BaseException) -> str | None:
    """Return what to do about an error, or ``None`` if its cause is not a known one."""
    texts = [f"{type(cause).__name__}: {cause}" for cause in exception_chain(error)]
    remedies = (remedy for part, remedy in REMEDIES.items() if any(part in text for text in texts))
    return next(remedies, None)


def has_adaptive_steps(error: BaseException) -> bool:
    """Return True if control flow in a solver with adaptive steps caused an error."""
    frames = traceback.extract_tb(error.__traceback__)
    names = {frame.name for frame in frames if "torchdiffeq" in Path(frame.filename).parts}
    return is_data_dependent(error) and not names.isdisjoint(ADAPTIVE_METHODS)


def is_data_dependent(error: BaseException) -> bool:
    """Return True if control flow that depends on values caused an error."""
    return any(type(cause).__name__ in DATA_DEPENDENT for cause in exception_chain(error))


def takes_values(error: BaseException) -> bool:
    """Return True if Python reading the values of a tensor caused an error.

    In torch 2.6, ``bincount``, whose size depends on values, is refused before its size is read.
    """
    return is_data_dependent(error) or any(
        LEAVES_FOR_NUMPY in str(cause) or type(cause).__name__ == DYNAMIC_SIZE
        for cause in exception_chain(error)
    )


def exception_chain(error: BaseException | None) -> list[BaseException]:
    """Return an exception and its causes."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def innermost_user_line(trace: TracebackType | None) -> str:
    """Return the innermost of the user's lines in a traceback: ``file:line (`code`)``."""
    frames = reversed(traceback.extract_tb(trace))
    return user_line(Line(f.filename, f.lineno, f.name, f.line or "") for f in frames)


class DataDependentError(Exception):
    """Stands for torch's RuntimeError about data-dependent control flow.

    It is no RuntimeError, because torch.export prints its whole graph when it sees one of those.
    """


@contextmanager
def convert_data_dependent_errors() -> Iterator[None]:
    """Raise torch's errors about data-dependent control flow as :class:`DataDependentError`."""
    try:
        yield
    except RuntimeError as error:
        if "data-dependent" not in str(error):
            raise
        raise DataDependentError(str(error)).with_traceback(error.__traceback__) from error
