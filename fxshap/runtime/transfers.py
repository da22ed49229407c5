"""What an explanation reads from its device: one transfer for a call, a cotangent or a batch.

Where the processor reads a value of a tensor on a GPU, it waits until the GPU has computed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fxshap.rules.core.tracing import deferring_conditions, is_deferring

T = TypeVar("T")


@dataclass(frozen=True)
class RowsReading:
    """What is read of the rows of a call.

    Attributes
    ----------
    repeated : bool
        Whether all sample rows are the same.
    finite : bool
        Whether what is explained of the first sample row is finite.
    same_references : bool
        Whether the references are those of the call before.
    first_row : bytes
        The first sample row of all inputs.
    """

    repeated: bool
    finite: bool
    same_references: bool
    first_row: bytes


def read_rows(
    samples: Sequence[Tensor],
    explained: int,
    references: Sequence[Tensor],
    known: Sequence[Tensor] | None,
) -> RowsReading:
    """Read what decides how a call is explained.

    Parameters
    ----------
    samples, references : sequence of Tensor
        One tensor per input, of shape (rows, ...).
    explained : int
        How many of the inputs, the first ones, are explained.
    known : sequence of Tensor, optional
        The references of the call before.
    """
    device = samples[0].device
    pairs = [] if known is None else list(zip(known, references, strict=True))
    comparable = known is not None and all(old.shape == new.shape for old, new in pairs)
    conditions = (
        [(x == x[:1]).all() for x in samples],
        [x[:1].isfinite().all() for x in samples[:explained]],
        [(old == new).all() for old, new in pairs] if comparable else [],
    )
    flags = [flag.to(device) for each in conditions for flag in each]
    parts = [torch.stack(flags).view(torch.uint8), *(bytes_of(x[:1]).to(device) for x in samples)]
    read = torch.cat(parts).cpu().numpy()
    counts = [len(each) for each in conditions]
    repeated, finite, same = (
        bool(read[sum(counts[:k]) : sum(counts[: k + 1])].all()) for k in range(len(counts))
    )
    return RowsReading(repeated, finite, comparable and same, read[len(flags) :].tobytes())


def bytes_of(x: Tensor) -> Tensor:
    """Return the values of a tensor as unsigned bytes, of shape (bytes,)."""
    # A copy, because only a tensor with contiguous strides can be viewed as bytes.
    copy = torch.empty(x.numel(), dtype=x.dtype, device=x.device).copy_(x.detach().flatten())
    return copy.view(torch.uint8)


@dataclass(frozen=True)
class CotangentReading:
    """What is read of a cotangent of rows ``[samples; references]``.

    Attributes
    ----------
    same : bool
        Whether both halves are the same.
    finite : bool
        Whether all outputs are finite.
    column : int or None
        The column of the first half that is all ones if all its other columns are zeros.
    """

    same: bool
    finite: bool
    column: int | None


def read_cotangent(grad: Tensor, output: Tensor) -> CotangentReading:
    """Read what decides how a cotangent goes backward; `output` has the same shape."""
    first, second = grad.chunk(2)
    flags = [(first == second).all(), output.isfinite().all()]
    if first.dim() == 2:
        column = first[0].argmax()
        unit = torch.arange(first.shape[1], device=first.device) == column
        flags += [(first == unit).all(), column]
    same, finite, *of_column = torch.stack([flag.long() for flag in flags]).tolist()
    is_unit, index = of_column or (False, 0)
    return CotangentReading(bool(same), bool(finite), index if is_unit else None)


class Deferral:
    """Runs explanations without reading the conditions of rules until the end.

    The result counts if no condition holds. Otherwise the explanation runs again and reads every
    condition, and so do all later ones: what held once often holds again.

    Attributes
    ----------
    trusted : bool
        Whether no condition has held so far.
    """

    def __init__(self) -> None:
        self.trusted = True

    def __call__(self, run: Callable[[], T]) -> T:
        """Return ``run()``, which may run twice."""
        if is_deferring() or not self.trusted:
            return run()
        with deferring_conditions() as conditions:
            try:
                result = run()
            except torch.OutOfMemoryError:
                raise
            except Exception:  # perhaps because an assumption did not hold
                if not any_holds(conditions):
                    raise
        if any_holds(conditions):
            self.trusted = False
            return run()
        return result


def any_holds(conditions: Sequence[Tensor]) -> bool:
    """Return True if a condition holds, with one transfer from each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for condition in conditions:
        by_device.setdefault(condition.device, []).append(condition)
    return any(bool(torch.stack(each).any()) for each in by_device.values())
