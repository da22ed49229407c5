"""Attributions on disk, written by ranges of rows: Parquet, NumPy and Zarr."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fxshap.datasets.columns import (
    Array,
    Batch,
    add_columns,
    column_names,
    is_arrow,
    read_column,
    table_of,
)
from fxshap.datasets.extras import import_extra
from fxshap.datasets.parts import FOLDER, TEMPORARY, Part, temporary_file
from fxshap.errors import InputError, OptionError

Format = Literal["parquet", "numpy", "zarr"]
#: The most bytes of one chunk of Zarr.
CHUNK_BYTES = 16 << 20
SUFFIXES: dict[str, Format] = {".zarr": "zarr", ".npy": "numpy"}


@dataclass(frozen=True)
class Chunk:
    """Some rows of a part.

    Attributes
    ----------
    start : int
        The index of the first row in the data set.
    batch : mapping, DataFrame or Table
        The data.
    columns : dict of str to (ndarray or list)
        The new columns.
    """

    start: int
    batch: Batch
    columns: Mapping[str, Any]


class Sink(ABC):
    """Where parts are written, by any worker, in any order, and again after a failure.

    Parameters
    ----------
    folder : Path
    rows : int
        The number of rows of the data set.
    rows_per_part : int
    keep : sequence of str, optional
        The columns of the data that are written, too; by default all.
    """

    def __init__(
        self, folder: Path, rows: int, rows_per_part: int, keep: Sequence[str] | None = None
    ) -> None:
        self.folder = folder
        self.rows = rows
        self.rows_per_part = rows_per_part
        self.keep = keep

    @abstractmethod
    def write(self, part: Part, chunks: Iterable[Chunk]) -> None:
        """Write the chunks of a part. What is there of the part is overwritten."""

    def clean(self) -> None:
        """Remove what workers that were killed have left."""
        for folder in (self.folder, self.folder / FOLDER):
            for file in folder.glob(f"{TEMPORARY}*"):
                file.unlink(missing_ok=True)

    def has(self, part: Part) -> bool:
        """Return True if what a finished part has written is there."""
        return self.folder.exists()


def open_sink(
    out: Path, format: Format | None, rows: int, rows_per_part: int, keep: Sequence[str] | None
) -> Sink:
    """Return the sink of a format, by default that of the suffix, or Parquet."""
    kinds: dict[str, Callable[..., Sink]] = {
        "parquet": ParquetSink,
        "numpy": NumpySink,
        "zarr": ZarrSink,
    }
    name = format or SUFFIXES.get(out.suffix, "parquet")
    if name not in kinds:
        raise OptionError(f"format is {' or '.join(get_args(Format))}, not {name!r}")
    if name == "zarr":
        import_extra("zarr", "zarr>=3")
    return kinds[name](out, rows, rows_per_part, keep)


class ParquetSink(Sink):
    """A folder of Parquet files, one for each part, with the data and the attributions."""

    def file(self, part: Part) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{part.index:06d}.parquet"

    def has(self, part: Part) -> bool:
        """Return True if the file of a part is there."""
        return self.file(part).exists()

    def write(self, part: Part, chunks: Iterable[Chunk]) -> None:
        """Write a file, under its name only when it is complete."""
        import pyarrow.parquet as parquet

        temporary = temporary_file(self.folder)
        writer = None
        try:
            for chunk in chunks:
                table = self._table(chunk)
                writer = writer or parquet.ParquetWriter(temporary, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
        with temporary.open("r+b") as stream:  # Windows flushes only what may be written
            os.fsync(stream.fileno())  # on disk before the part counts as done
        temporary.replace(self.file(part))

    def _table(self, chunk: Chunk) -> Any:
        table = chunk.batch if is_arrow(chunk.batch) else table_of(chunk.batch)
        if self.keep is not None:
            missing = [name for name in self.keep if name not in column_names(table)]
            if missing:
                raise InputError(f"the data has no column {missing[0]!r} to keep")
            table = table.select(list(self.keep))
        return add_columns(table, chunk.columns)


class ArraySink(Sink):
    """Arrays with all rows, which parts write a range of.

    The texts of errors are not among them; the summary has them.
    """

    def write(self, part: Part, chunks: Iterable[Chunk]) -> None:
        """Write the rows of a part into every array."""
        for chunk in chunks:
            for name, values in self._arrays(chunk).items():
                self._put(name, chunk.start, values)

    @abstractmethod
    def _put(self, name: str, start: int, values: Array) -> None:
        """Write a range of rows into the array of a column, which is made by the first."""

    def _arrays(self, chunk: Chunk) -> dict[str, Array]:
        passed_on = {name: read_column(chunk.batch, name) for name in self.keep or ()}
        new = {name: v for name, v in chunk.columns.items() if isinstance(v, np.ndarray)}
        return {**passed_on, **new}


class NumpySink(ArraySink):
    """A folder with a ``.npy`` file for each column."""

    def _put(self, name: str, start: int, values: Array) -> None:
        file = self.folder / f"{name}.npy"
        if not file.exists():
            temporary = temporary_file(self.folder)
            shape = (self.rows, *values.shape[1:])
            np.lib.format.open_memmap(temporary, "w+", values.dtype, shape).flush()
            try:
                os.link(temporary, file)  # fails if another worker was faster
            except FileExistsError:
                pass
            temporary.unlink()
        array = np.load(file, mmap_mode="r+")
        array[start : start + len(values)] = values
        array.flush()


class ZarrSink(ArraySink):
    """A group of Zarr with an array for each column. No chunk belongs to two parts."""

    def _chunk_rows(self, values: Array) -> int:
        """Return the rows of a chunk: a divisor of the rows of a part."""
        size = values[:1].nbytes
        fit = [n for n in divisors(self.rows_per_part) if n * size <= CHUNK_BYTES]
        return max(fit, default=1)

    def _put(self, name: str, start: int, values: Array) -> None:
        zarr = import_extra("zarr", "zarr>=3")
        group = zarr.open_group(self.folder, mode="a")
        zarr.open_group(self.folder / FOLDER, mode="a")  # else Zarr warns of an unknown folder
        if name not in group:
            rest = values.shape[1:]
            chunks = (self._chunk_rows(values), *rest)
            try:
                group.create_array(
                    name, shape=(self.rows, *rest), chunks=chunks, dtype=values.dtype
                )
            except zarr.errors.ContainsArrayError:  # another worker was faster
                pass
        group[name][start : start + len(values)] = values


def divisors(number: int) -> list[int]:
    """Return the divisors of a number."""
    return [n for n in range(1, number + 1) if number % n == 0]
