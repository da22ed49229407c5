"""The check that samples and references take the decisions of the capture.

``assert x.isfinite().all()`` or the validation of a distribution's parameters changes no value, but
raises for some inputs. The user's own model is run on the samples and the references, and what its
decisions read is compared with what they read during the capture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxshap.capture.captured import Captured
from fxshap.capture.readings import AS_TENSOR
from fxshap.errors import InputError
from fxshap.graph.provenance import running_line
from fxshap.runtime.batching import allclose_to_largest


class DecisionCheck:
    """Checks that inputs take the decisions of a capture.

    Parameters
    ----------
    output : callable
        ``output(inputs)`` runs the user's model and returns the output that is explained.
    graph : callable
        ``graph(inputs)`` returns the output of the captured graph.
    captured : Captured
        With the decisions.
    """

    def __init__(
        self,
        output: Callable[[Sequence[Tensor]], Tensor],
        graph: Callable[[Sequence[Tensor]], Tensor],
        captured: Captured,
    ) -> None:
        self.output = output
        self.graph = graph
        self.captured = captured
        self._checked: dict[str, tuple[Hashable, list[Tensor]]] = {}

    @property
    def is_needed(self) -> bool:
        """Whether the model takes a decision that has to be checked."""
        return bool(self.captured.decisions or self.captured.numbers)

    def __call__(self, role: str, inputs: Sequence[Tensor], explanation: Hashable) -> None:
        """Check inputs, once in an explanation.

        Parameters
        ----------
        role : str
            What they are, for the message.
        inputs : sequence of Tensor
        explanation : hashable

        Raises
        ------
        InputError
            If the model raises an error, or decides otherwise than during the capture.
        """
        if self._is_checked(role, inputs, explanation):
            return
        output, truths = self._run(role, inputs)
        for line, expected in self.captured.decisions.items():
            captured = [value for value in expected if isinstance(value, bool)]
            if not alike(truths.get(line, []), captured):
                raise InputError(
                    f"at {line}, the model decides otherwise for the {role} than for the rows that "
                    "it was captured with, and it raises an error on a branch there; explain "
                    "samples and references for which it decides alike"
                )
        if self.captured.numbers and not allclose_to_largest(self.graph(inputs), output):
            raise InputError(
                f"the model computes something else for the {role} than the graph of it, because "
                f"of a number that it takes out of a tensor at {'; '.join(self.captured.numbers)}; "
                "compute with the tensor itself"
            )
        self._checked[role] = (explanation, [x.clone() for x in inputs])

    def _is_checked(self, role: str, inputs: Sequence[Tensor], explanation: Hashable) -> bool:
        before, checked = self._checked.get(role, (None, []))
        same = before == explanation and len(checked) == len(inputs)
        return same and all(map(torch.equal, checked, inputs))

    def _run(self, role: str, inputs: Sequence[Tensor]) -> tuple[Tensor, dict[str, list[bool]]]:
        recorder = TruthRecorder()
        with torch.no_grad(), recorder:
            try:
                return self.output(inputs), recorder.truths
            except Exception as error:
                lines = "; ".join(self.captured.decisions or self.captured.numbers)
                raise InputError(
                    f"the model raises {type(error).__name__} for the {role}, where it decides by "
                    f"its inputs at {lines}: {error}"
                ) from error


def alike(truths: Sequence[bool], captured: Sequence[bool]) -> bool:
    """Return True if a line takes the branches of the capture, in their order if it is known."""
    if len(truths) == len(captured):
        return truths == captured
    return set(truths) <= set(captured)


def without_repetitions(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the first row if all rows are the same, and otherwise all."""
    if all(bool((x == x[:1]).all()) for x in inputs):
        return [x[:1] for x in inputs]
    return inputs


def with_two_rows_at_least(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return a single row twice: models treat it in their own way, as ``squeeze()`` does."""
    return [torch.cat([x, x]) for x in inputs] if len(inputs[0]) == 1 else inputs


class TruthRecorder(TorchDispatchMode):
    """Records the truth values that Python reads, by the user's line.

    Attributes
    ----------
    truths : dict of str to list of bool
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.truths: dict[str, list[bool]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        value = func(*args, **(kwargs or {}))
        if func in AS_TENSOR and isinstance(value, bool):
            self.truths[running_line()].append(value)
        return value
