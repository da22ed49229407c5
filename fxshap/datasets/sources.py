"""Data sets on disk, read by ranges of rows: Parquet, NumPy and Zarr."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fxshap.datasets.columns import Array, Batch
from fxshap.datasets.extras import import_extra
from fxshap.errors import InputError


class Source(ABC):
    """A data set with a fixed order of rows, which any worker can open.

    Attributes
    ----------
    rows : int
        The number of rows.
    """

    rows: int

    @abstractmethod
    def read(self, start: int, stop: int) -> Batch:
        """Return a range of rows."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest that changes with the data."""


def open_source(data: Any) -> Source:
    """Open a data set.

    Parameters
    ----------
    data : path, or sequence of paths
        Parquet files or folders of them (``.parquet``), arrays of NumPy (``.npy``, or a folder of
        them, one for each column), or an array or a group of Zarr (``.zarr``).

    Raises
    ------
    InputError
        If there is no such data, or it has no rows.
    """
    given = data if isinstance(data, list | tuple) else [data]
    paths = [Path(path) for path in given]
    for path in paths:
        if not path.exists():
            raise InputError(f"there is no data at {path}")
    paths = [path.absolute() for path in paths]  # workers have other current folders
    first = paths[0]
    source: Source | None = None
    if first.suffix == ".zarr":
        source = ZarrSource(first)
    elif first.suffix == ".npy" or (first.is_dir() and any(first.glob("*.npy"))):
        source = NumpySource(first)
    if source is not None and len(paths) > 1:
        raise InputError(f"only Parquet may be in several files; {first} is one of {len(paths)}")
    source = source or ParquetSource(paths)
    if not source.rows:
        raise InputError(f"{first} has no rows")
    return source


class ParquetSource(Source):
    """Parquet files, in the order of their names.

    Parameters
    ----------
    paths : sequence of Path
        Files, or folders of files whose names do not begin with ``_`` or a dot.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        parquet = import_extra("pyarrow.parquet", "pyarrow")
        self.files = [file for path in paths for file in parquet_files(path)]
        self.groups: list[tuple[Path, int, int]] = []
        starts = [0]
        for file in self.files:
            metadata = parquet.read_metadata(file)
            changed = file.stat().st_mtime_ns
            for group in range(metadata.num_row_groups):
                self.groups.append((file, group, changed))
                starts.append(starts[-1] + metadata.row_group(group).num_rows)
        self.starts = np.array(starts)
        self.rows = starts[-1]

    def read(self, start: int, stop: int) -> Any:
        """Return a range of rows as an Arrow table."""
        import pyarrow as pa

        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        last = int(np.searchsorted(self.starts, stop, side="left"))
        tables = []
        for i in range(first, last):
            offset = self.starts[i]
            begin, end = max(start, offset), min(stop, self.starts[i + 1])
            tables.append(read_row_group(*self.groups[i]).slice(begin - offset, end - begin))
        return pa.concat_tables(tables) if len(tables) > 1 else tables[0]

    def fingerprint(self) -> str:
        """Return a digest of the footers, and of the times of the last changes.

        Footers hold the sizes and ranges of all columns, which a change may leave as they are.
        """
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(str(file.stat().st_mtime_ns).encode())
            with file.open("rb") as stream:
                stream.seek(-8, 2)
                size = int.from_bytes(stream.read(4), "little")
                stream.seek(-8 - size, 2)
                digest.update(stream.read(size))
        return digest.hexdigest()


@lru_cache(maxsize=2)
def read_row_group(file: Path, group: int, changed: int) -> Any:
    """Return a row group, which serves the parts of a process that lie in it.

    Parameters
    ----------
    file : Path
    group : int
    changed : int
        The time of the file's last change: a file that is written again is read again.
    """
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file) as opened:
        return opened.read_row_group(group)


def parquet_files(path: Path) -> list[Path]:
    """Return the Parquet files of a folder, or the file itself."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*.parquet") if file.is_file())
    parts = ((file, file.relative_to(path).parts) for file in files)
    return [file for file, names in parts if not any(name[0] in "._" for name in names)]


class ArraySource(Source):
    """Arrays by column, with the rows first.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        rows = {name: array.shape[0] for name, array in self.arrays().items()}
        if len(set(rows.values())) > 1:
            raise InputError(f"the arrays of {path} have different numbers of rows: {rows}")
        self.rows = next(iter(rows.values()), 0)

    @abstractmethod
    def arrays(self) -> dict[str, Any]:
        """Return the arrays by column, without reading their values."""

    def read(self, start: int, stop: int) -> dict[str, Array]:
        """Return a range of rows of every array."""
        return {name: np.array(array[start:stop]) for name, array in self.arrays().items()}


class NumpySource(ArraySource):
    """A ``.npy`` file, which is the column ``x``, or a folder with a file for each column."""

    def files(self) -> dict[str, Path]:
        """Return the files by column."""
        if self.path.is_dir():
            return {file.stem: file for file in sorted(self.path.glob("*.npy"))}
        return {"x": self.path}

    def arrays(self) -> dict[str, Any]:
        """Return the arrays, mapped into memory."""
        return {name: np.load(file, mmap_mode="r") for name, file in self.files().items()}

    def fingerprint(self) -> str:
        """Return a digest of the sizes and the times of the last changes."""
        facts = [(name, file.stat()) for name, file in self.files().items()]
        text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts])
        return hashlib.sha256(text.encode()).hexdigest()


class ZarrSource(ArraySource):
    """An array of Zarr, which is the column ``x``, or a group with an array for each column."""

    def arrays(self) -> dict[str, Any]:
        """Return the arrays of the group."""
        zarr = import_extra("zarr", "zarr>=3")
        node = zarr.open(self.path, mode="r")
        return {"x": node} if isinstance(node, zarr.Array) else dict(node.arrays())

    def fingerprint(self) -> str:
        """Return a digest of the names, shapes and dtypes, and of the files' times and sizes."""
        facts = [(name, a.shape, str(a.dtype)) for name, a in sorted(self.arrays().items())]
        files = sorted(p for p in self.path.rglob("*") if p.is_file())
        stats = [(str(p.relative_to(self.path)), p.stat().st_size, p.stat().st_mtime_ns)
                 for p in files]  # fmt: skip
        return hashlib.sha256(repr((facts, stats)).encode()).hexdigest()
