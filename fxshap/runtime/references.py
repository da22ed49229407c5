"""The references of an explanation, on as many tapes as fit into memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fxshap.autograd.tape import Tape
from fxshap.frontend.inputs import check_finite
from fxshap.runtime.program import Program

logger = logging.getLogger("fxshap")

#: The ratio of the bytes of a tape to those of its taps: the taps, slopes, and a margin.
TAPE_PER_TAP = 4
#: The share of the free memory that a tape may take.
SHARE = 0.5


class References:
    """References on one cached tape, or on several that every backward pass records again.

    Parameters
    ----------
    program : Program
    inputs : sequence of Tensor
        One tensor per input, of shape (references, ...).
    rows : int
        The largest number of rows on one tape.
    max_batched : int
        The largest number of outputs in one batched backward pass, on a cached tape.

    Attributes
    ----------
    output : Tensor
        The model's output for every reference.
    """

    def __init__(
        self, program: Program, inputs: Sequence[Tensor], rows: int, max_batched: int = 1
    ) -> None:
        check_finite("references", inputs[: program.explained])
        self.program = program
        self.explained = program.explained
        self.inputs = [x.detach().clone() for x in inputs]
        self.rows = rows
        self.max_batched = max_batched
        self.cached_tape: Tape | None = None
        self.output = torch.cat([self.tape(part).output.detach() for part in self.parts()])
        program.check_output(self.inputs, self.output)

    def tape(self, part: slice) -> Tape:
        """Return the tape of a part of the references; drop it before requesting the next."""
        if self.cached_tape:
            return self.cached_tape
        references = [x[part] for x in self.inputs]
        if self.rows < len(self.inputs[0]):
            return self.program.tape(references, reused=False)
        self.cached_tape = self.program.tape(references, self.max_batched)
        return self.cached_tape

    def parts(self) -> list[slice]:
        """Return the rows of each tape."""
        count = len(self.inputs[0])
        return [slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows)]

    def equal(self, inputs: Sequence[Tensor]) -> bool:
        """Return True if these are the same references."""
        return all(
            old.shape == new.shape and torch.equal(old, new)
            for old, new in zip(self.inputs, inputs, strict=True)
        )

    @property
    def size(self) -> int:
        """Bytes of the multipliers of one output."""
        return sum(x.numel() * x.element_size() for x in self.inputs[: self.explained])


def rows_that_fit(size: int, device: torch.device, max_memory: int | None = None) -> int | None:
    """Return how many references one tape may hold; ``None`` if that is not known.

    Parameters
    ----------
    size : int
        Bytes of the taps of one reference.
    device : torch.device
    max_memory : int, optional
        The bytes that a tape may take, by default a share of the free memory of the device.
    """
    if max_memory is None and (free := free_memory(device)) is not None:
        max_memory = int(SHARE * free)
    if max_memory is None or not size:
        return None
    rows = max(max_memory // (TAPE_PER_TAP * size), 1)
    logger.debug("%.0f MiB on %s hold %d references", max_memory / 2**20, device, rows)
    return rows


def free_memory(device: torch.device) -> float | None:
    """Return the free bytes of a device; ``None`` where the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min(available, container_memory())


def container_memory(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the free bytes of the container that the process runs in; infinity without a limit."""
    try:
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
    except OSError:
        return math.inf
    return math.inf if limit.strip() == "max" else max(int(limit) - int(used), 0)
