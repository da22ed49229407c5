"""Multipliers computed before SHAP requests them.

SHAP requests output by output and, within an output, sample by sample. Most of a backward pass does
not depend on the output: the sample's values, and the slopes between the two endpoints. So when a
sample comes back for its second output, the multipliers of all other outputs are computed too, and
cached until SHAP requests them. For a model of few outputs, the first request computes all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxshap.autograd.tape import Multipliers
from fxshap.runtime.references import References

#: Returns multipliers for several cotangents of the output between the same endpoints.
BackwardMany = Callable[[Sequence[Tensor]], Multipliers]

#: Models with up to this many outputs get the multipliers of all of them at the first request.
FEW_OUTPUTS = 4
#: The largest size of the cache, in bytes.
MAX_BYTES = 2**28


class CachedMultipliers:
    """What is cached for one sample.

    Attributes
    ----------
    output : Tensor or None
        The model's output for the sample.
    by_output : dict of int to list of Tensor
        For outputs not requested yet, the multipliers of every input.
    requested : set of int
        The outputs that were requested.
    """

    def __init__(self) -> None:
        self.output: Tensor | None = None
        self.by_output: dict[int, list[Tensor]] = {}
        self.requested: set[int] = set()


class MultiplierCache:
    """The multipliers of one explanation, by sample.

    Parameters
    ----------
    explanation : object
        Identifies the explanation.
    references : References or None
        What the samples are compared with.
    """

    def __init__(self, explanation: object, references: References | None) -> None:
        self.explanation = explanation
        self.references = references
        self.samples: dict[bytes, CachedMultipliers] = {}

    def for_sample(self, row: bytes) -> CachedMultipliers:
        """Return what is cached for a sample, given the bytes of its rows."""
        return self.samples.setdefault(row, CachedMultipliers())

    def free_outputs(self) -> int:
        """Return for how many more outputs one sample may cache its multipliers."""
        assert self.references is not None
        size = self.references.size
        used = sum(len(cached.by_output) for cached in self.samples.values())
        fair = MAX_BYTES // (size * max(len(self.samples), 1))
        return min(fair, max(MAX_BYTES // size - used, 0))

    def backward(
        self,
        cached: CachedMultipliers,
        backward_many: BackwardMany,
        grad: Tensor,
        column: int | None,
    ) -> list[Tensor]:
        """Return multipliers for the cotangent `grad`, and cache those of other outputs.

        Parameters
        ----------
        cached : CachedMultipliers
            What is cached for the sample.
        backward_many : callable
            Returns multipliers from the references to the sample.
        grad : Tensor
            Cotangent of the output, of shape (references, outputs).
        column : int or None
            The only output whose cotangent is not 0, if that is 1 in every row.
        """
        if column is None:
            return backward_many([grad])[0]
        if column not in cached.by_output:
            outputs = grad.shape[1]
            others = [(column + k) % outputs for k in range(1, outputs)]
            others = [k for k in others if k not in cached.requested and k not in cached.by_output]
            if not cached.requested and outputs > FEW_OUTPUTS:
                others = []  # SHAP may want only this output of this sample
            columns = [column, *others[: self.free_outputs()]]
            multipliers = backward_many([unit_column(grad, k) for k in columns])
            cached.by_output.update(zip(columns, multipliers, strict=True))
        cached.requested.add(column)
        return cached.by_output.pop(column)


EMPTY_CACHE = MultiplierCache(None, None)


def unit_column(grad: Tensor, column: int) -> Tensor:
    """Return the cotangent that is 1 for one output, in every row, and 0 for the others."""
    unit = torch.zeros_like(grad)
    unit[:, column] = 1
    return unit
