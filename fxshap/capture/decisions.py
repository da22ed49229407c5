"""What decisions by the explained inputs change: nothing, an error, or the computation.

A model may take a number out of its input for ``assert x.isfinite().all()``, for a warning, or for
a statistic that it stores. No attribution depends on those. Every line that reads such a number is
tried with other answers: if the model computes the same, the line has no influence; if it raises,
the graph is that of inputs for which it does not; if it computes something else, no single graph
describes the model.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxshap.capture.captured import Captured
from fxshap.capture.diagnostics import DECIDES, TAKES_NUMBER, not_one_graph
from fxshap.capture.readings import (
    Answers,
    EndlessTraceError,
    Trace,
)
from fxshap.errors import CaptureError

#: A trace with other answers may have so many times as many readings and operations, and as many
#: more.
LONGER, SLACK = 4, 200


class Outcome(Enum):
    """What a model does if a line reads something else."""

    SAME = auto()
    RAISES = auto()
    DIFFERENT = auto()


def check_decisions(
    captured: Captured, trace: Trace, retrace: Callable[[Answers], Captured]
) -> Captured:
    """Return a capture with the decisions that its inputs must take as it did.

    Parameters
    ----------
    captured : Captured
        It has readings that depend on the explained inputs.
    trace : Trace
        Of this capture.
    retrace : callable
        Captures the model again, with other answers.

    Raises
    ------
    CaptureError
        If the model computes something else when a line reads something else.
    """
    attempts = Attempts(captured, trace, retrace)
    lines: dict[str, list[Any]] = {}
    for reading in captured.readings:
        lines.setdefault(reading.line, []).append(reading.value)
    decisions, numbers = {}, []
    for line, values in lines.items():
        choices = range(max(len(alternatives(value)) for value in values))
        outcomes = []
        for choice in choices:
            outcomes.append(attempts.outcome({line: partial(alternative, choice)}))
            if outcomes[-1] is Outcome.DIFFERENT:
                reason = TAKES_NUMBER if any(map(is_fraction, values)) else DECIDES
                raise CaptureError(not_one_graph(line, reason))
        if Outcome.RAISES in outcomes:
            decisions[line] = [r.value for r in trace.readings if r.line == line]
        if not all(isinstance(value, bool) for value in values):
            numbers.append(line)
    attempts.check_together(decisions)
    return replace(captured, decisions=decisions, numbers=tuple(numbers))


class Attempts:
    """What a model computes if its lines read something else.

    Parameters
    ----------
    captured, trace, retrace
        As in :func:`check_decisions`.

    Attributes
    ----------
    truths : dict of str to int
        How many truth values a line has read, at most.
    """

    def __init__(
        self, captured: Captured, trace: Trace, retrace: Callable[[Answers], Captured]
    ) -> None:
        self.limits = [LONGER * count + SLACK for count in (len(trace.readings), trace.operations)]
        self.computed = structure(captured)
        self.retrace = retrace
        self.truths: Counter[str] = Counter()
        self.count_truths(captured)

    def outcome(self, altered: Mapping[str, Callable[[Any], Any]]) -> Outcome:
        """Capture the model with other answers, and compare."""
        try:
            with silenced():
                other = self.retrace(Answers(True, altered, *self.limits))
                same = structure(other) == self.computed
        except EndlessTraceError:
            return Outcome.DIFFERENT
        except Exception:
            return Outcome.RAISES
        self.count_truths(other)
        return Outcome.SAME if same else Outcome.DIFFERENT

    def count_truths(self, captured: Captured) -> None:
        """Count the truth values that every line of a capture has read."""
        self.truths |= Counter(r.line for r in captured.readings if is_truth(r.value))

    def check_together(self, raising: Collection[str]) -> None:
        """Alter several readings at once, because ``a and b`` may need both to be another.

        Parameters
        ----------
        raising : collection of str
            Lines that are left as they are: the model raises if they read something else.

        Raises
        ------
        CaptureError
            If the model then computes something else.
        """
        lines = [line for line in self.truths if line not in raising]
        if sum(self.truths[line] for line in lines) < 2:
            return
        for alter in (partial(alternative, 0), partial(always, True), partial(always, False)):
            altered = {line: alter for line in lines}
            if self.outcome(altered) is Outcome.DIFFERENT:
                raise CaptureError(not_one_graph(lines[0], DECIDES))


def is_fraction(value: Any) -> bool:
    """Return True if a value enters the computation rather than an ``if``, a loop or an index."""
    return isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())


@contextmanager
def silenced() -> Iterator[None]:
    """Silence what a model prints and logs on a branch that it does not take."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def structure(captured: Captured) -> list[Any]:
    """Return what is equal for captures that compute the same, whatever their nodes are called."""
    names: dict[Any, str] = {}
    described: list[Any] = []
    for node in captured.module.graph.nodes:
        arguments = pytree.tree_map_only(fx.Node, names.get, (node.args, node.kwargs))
        target: Any = node.target
        if node.op == "get_attr":
            constant = getattr(captured.module, str(target))
            target = captured.weights.get(str(target)) or digest(constant)
        names[node] = f"%{len(names)}"
        described.append((node.op, target, repr(arguments)))
    return described


def digest(tensor: Tensor) -> tuple[Any, ...]:
    """Return what is equal for equal constants."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.shape, tensor.dtype, data


# --- other answers --------------------------------------------------------------------------------

#: The steps to other numbers, relative to the number and 1. Near ones find that a number enters the
#: computation or is an index, far ones find a comparison with a threshold.
STEPS = (0.1, 1.0, 1e30)
#: The steps to other integers.
INTEGER_STEPS = (1, 10**6)


def alternatives(value: Any) -> list[Any]:
    """Return other values that a reading could have: the other truth value, or other numbers."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, Tensor) and value.dtype is torch.bool:
        return [~value]
    if isinstance(value, int) or (isinstance(value, Tensor) and not value.is_floating_point()):
        steps = [sign * step for step in INTEGER_STEPS for sign in (1, -1)]
        return [value + step for step in steps]
    size = 1 + abs(value)
    return [value + sign * step * size for step in STEPS for sign in (1, -1)]


def alternative(choice: int, value: Any) -> Any:
    """Return one of the :func:`alternatives`, the last if there are fewer."""
    others = alternatives(value)
    return others[min(choice, len(others) - 1)]


def always(truth: bool, value: Any) -> Any:
    """Return the same answer to all questions for a truth value, and numbers as they are."""
    if not is_truth(value):
        return value
    return torch.full_like(value, truth) if isinstance(value, Tensor) else truth


def is_truth(value: Any) -> bool:
    """Return True if a value is a truth value, or a tensor of them."""
    return isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool)
