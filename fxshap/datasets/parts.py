"""The division of a data set into parts, each of which one worker explains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

#: The rows of a part: at most, unless there were too many parts, and at least.
MAX_ROWS, MIN_ROWS, MAX_PARTS = 8192, 64, 4096
#: The most bytes of the inputs of a part.
MAX_BYTES = 256 << 20
#: The folder of the output that records which parts are done. Readers of Parquet leave it out.
FOLDER = "_fxshap"
#: Begins the names of files that are not complete. Readers leave out such names, too.
TEMPORARY = ".unfinished-"
#: Into how many parts a data set is divided at least, if they have rows enough: in all, and for
#: each worker.
PARTS, PARTS_OF_WORKER = 64, 8


@dataclass(frozen=True)
class Part:
    """A range of rows that one worker explains and writes.

    Attributes
    ----------
    index, start, stop : int
    """

    index: int
    start: int
    stop: int


def rows_per_part_of(rows: int, row_bytes: int, workers: int = 1) -> int:
    """Return how many rows a part has, a power of two.

    Parameters
    ----------
    rows : int
        The rows of the data set.
    row_bytes : int
        The bytes of the inputs of one row.
    workers : int
    """
    parts = max(PARTS, PARTS_OF_WORKER * workers)
    wanted = min(rows // parts, MAX_ROWS, MAX_BYTES // max(row_bytes, 1))
    wanted = max(wanted, rows // max(MAX_PARTS, parts))
    return int(1 << max(wanted, MIN_ROWS).bit_length() - 1)


def divide(rows: int, rows_per_part: int) -> list[Part]:
    """Divide rows into parts."""
    starts = range(0, rows, rows_per_part)
    return [Part(i, start, min(start + rows_per_part, rows)) for i, start in enumerate(starts)]


def temporary_file(folder: Path) -> Path:
    """Return a new name for a file that is written, and then gets its own name."""
    return folder / f"{TEMPORARY}{uuid4().hex}"
