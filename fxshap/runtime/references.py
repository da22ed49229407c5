"""The references of an explanation, on as many tapes as fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx

from fxshap.autograd.tape import Fused, Tape
from fxshap.frontend.inputs import check_finite

logger = logging.getLogger("fxshap")

#: How many references go onto one tape: a number, or as many as free memory holds.
ReferenceBatchSize = int | Literal["auto"]

#: What a tape takes for a row, over what the row's taps take: the taps, slopes, and some room.
TAPE_PER_TAP = 4
#: The part of the free memory that a tape may take.
SHARE = 0.5


class References:
    """References on one tape that is kept, or on several that are recorded again for every walk.

    Parameters
    ----------
    attribute : fx.GraphModule
        ``attribute(ends, *inputs) -> output``.
    inputs : sequence of Tensor
        One tensor an input, of shape (references, ...).
    explained : int
        How many of the inputs, the first ones, have multipliers.
    rows : int
        The most rows that go onto one tape.
    abreast : int
        The most outputs that are walked side by side, on a tape that is kept.
    fused : Fused, optional
        Compiled walks for a tape that is kept.

    Attributes
    ----------
    output : Tensor
        The model's output for every reference.
    """

    def __init__(
        self,
        attribute: fx.GraphModule,
        inputs: Sequence[Tensor],
        explained: int,
        rows: int,
        abreast: int = 1,
        fused: Fused | None = None,
    ) -> None:
        check_finite("references", inputs[:explained])
        self.attribute = attribute
        self.explained = explained
        self.inputs = [x.detach().clone() for x in inputs]
        self.rows = rows
        self.abreast = abreast
        self.fused = fused
        self.kept: Tape | None = None
        self.output = torch.cat([self.tape(part).output.detach() for part in self.parts()])

    def tape(self, part: slice) -> Tape:
        """Return the tape of a part of the references; let go of it before asking for the next."""
        if self.kept:
            return self.kept
        references = [x[part] for x in self.inputs]
        if self.rows < len(self.inputs[0]):
            return Tape(self.attribute, references, self.explained)
        self.kept = Tape(self.attribute, references, self.explained, self.abreast, self.fused)
        return self.kept

    def parts(self) -> list[slice]:
        """Return the rows of each tape."""
        count = len(self.inputs[0])
        return [slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows)]

    def are(self, inputs: Sequence[Tensor]) -> bool:
        """Say whether these are the very same references."""
        return all(
            old.shape == new.shape and torch.equal(old, new)
            for old, new in zip(self.inputs, inputs, strict=True)
        )

    @property
    def size(self) -> int:
        """Bytes of the multipliers of one output."""
        return sum(x.numel() * x.element_size() for x in self.inputs[: self.explained])


def rows_that_fit(size: int, device: torch.device) -> int | None:
    """Return how many references one tape may hold, by the bytes of the taps of one.

    ``None`` if that is not known.
    """
    free = free_memory(device)
    if free is None or not size:
        return None
    rows = max(int(SHARE * free / (TAPE_PER_TAP * size)), 1)
    logger.debug("%.0f MiB are free on %s, enough for %d references", free / 2**20, device, rows)
    return rows


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device; ``None`` where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
