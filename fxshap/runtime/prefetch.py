"""Multipliers found before they are asked for.

SHAP asks output by output and, within an output, sample by sample. Most of a walk does not depend
on the output: the sample's values and the slopes between the two ends. So when a sample comes back
for its second output, all the others are walked as well, while the slopes are at hand, and kept
until SHAP asks for them. A model of few outputs is answered for all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxshap.runtime.coalitions import Multipliers
from fxshap.runtime.references import References

#: Walks for several cotangents of the output between the same ends.
Walks = Callable[[Sequence[Tensor]], Multipliers]

#: Models of so many outputs are answered for all of them at the first question.
FEW_OUTPUTS = 4
#: What may be kept for later questions, in bytes.
MAX_BYTES = 2**28


class CachedMultipliers:
    """What is known of one sample.

    Attributes
    ----------
    output : Tensor or None
        The model's output for the sample.
    found : dict of int to list of Tensor
        For each output not asked for yet, the multipliers of every input.
    asked : set of int
        The outputs that were asked for.
    """

    def __init__(self) -> None:
        self.output: Tensor | None = None
        self.found: dict[int, list[Tensor]] = {}
        self.asked: set[int] = set()


class MultiplierCache:
    """The answers of one explanation, by sample.

    Parameters
    ----------
    explanation : object
        Tells the explanation.
    references : References or None
        What the samples are compared with.
    """

    def __init__(self, explanation: object, references: References | None) -> None:
        self.explanation = explanation
        self.references = references
        self.of_sample: dict[tuple[bytes, ...], CachedMultipliers] = {}

    def of(self, sample: Sequence[Tensor]) -> CachedMultipliers:
        """Return what is known of a sample, one row an input."""
        return self.of_sample.setdefault(tuple(map(bytes_of, sample)), CachedMultipliers())

    def room(self) -> int:
        """Return for how many more outputs one sample may keep its multipliers."""
        assert self.references is not None
        size = self.references.size
        kept = sum(len(answer.found) for answer in self.of_sample.values())
        fair = MAX_BYTES // (size * max(len(self.of_sample), 1))
        return min(fair, max(MAX_BYTES // size - kept, 0))

    def walk(self, answer: CachedMultipliers, walks: Walks, grad: Tensor) -> list[Tensor]:
        """Return multipliers for the cotangent `grad`, and find those of other outputs ahead.

        Parameters
        ----------
        answer : Answer
            What is known of the sample.
        walks : callable
            Walks from the references to the sample.
        grad : Tensor
            Cotangent of the output, of shape (references, outputs).
        """
        column = single_column(grad)
        if column is None:
            return walks([grad])[0]
        if column not in answer.found:
            outputs = grad.shape[1]
            ahead = [(column + k) % outputs for k in range(1, outputs)]
            ahead = [k for k in ahead if k not in answer.asked and k not in answer.found]
            if not answer.asked and outputs > FEW_OUTPUTS:
                ahead = []  # perhaps only this output of this sample is wanted
            columns = [column, *ahead[: self.room()]]
            found = walks([unit_column(grad, k) for k in columns])
            answer.found.update(zip(columns, found, strict=True))
        answer.asked.add(column)
        return answer.found.pop(column)


def bytes_of(x: Tensor) -> bytes:
    """Return the values of a tensor as bytes; NumPy does not know all of torch's types."""
    # Into fresh memory, for only a tensor whose strides are in order can be viewed as bytes.
    copy = torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().flatten())
    return copy.view(torch.uint8).numpy().tobytes()


EMPTY_CACHE = MultiplierCache(None, None)


def single_column(grad: Tensor) -> int | None:
    """Return the column that is all ones where the others are all zeros, if there is one."""
    if grad.dim() != 2:
        return None
    column = int(grad[0].argmax())
    return column if torch.equal(grad, unit_column(grad, column)) else None


def unit_column(grad: Tensor, column: int) -> Tensor:
    """Return the cotangent of one output alone, in every row."""
    unit = torch.zeros_like(grad)
    unit[:, column] = 1
    return unit
