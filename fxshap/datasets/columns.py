"""The columns of a batch: of a dict of arrays, a DataFrame or an Arrow table."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fxshap.errors import InputError

Array: TypeAlias = npt.NDArray[Any]
#: A mapping of arrays or lists by column, a ``pandas.DataFrame`` or a ``pyarrow.Table``.
Batch: TypeAlias = Any

#: The metadata of an Arrow field that holds the shape of a row, as JSON.
SHAPE_KEY = b"shape"


def is_arrow(batch: Batch) -> bool:
    """Return True if a batch is an Arrow table or record batch."""
    arrow = sys.modules.get("pyarrow")
    return arrow is not None and isinstance(batch, arrow.Table | arrow.RecordBatch)


def is_frame(batch: Batch) -> bool:
    """Return True if a batch is a DataFrame of pandas."""
    return hasattr(batch, "iloc") and hasattr(batch, "columns")


def is_batch(value: Any) -> bool:
    """Return True if a value is a batch of columns."""
    return is_arrow(value) or is_frame(value) or isinstance(value, Mapping)


def column_names(batch: Batch) -> list[str]:
    """Return the names of the columns of a batch."""
    if is_arrow(batch):
        return list(batch.column_names)
    return list(batch.columns) if is_frame(batch) else list(batch)


def row_count(batch: Batch) -> int:
    """Return the number of rows of a batch."""
    if is_arrow(batch):
        return int(batch.num_rows)
    if is_frame(batch):
        return len(batch)
    return next((len(column) for column in batch.values()), 0)


def take_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Return a range of the rows of a batch."""
    if is_arrow(batch):
        return batch.slice(start, stop - start)
    if is_frame(batch):
        return batch.iloc[start:stop]
    return {name: column[start:stop] for name, column in batch.items()}


# --- reading ------------------------------------------------------------------------------------


def read_column(batch: Batch, name: str) -> Array:
    """Return a column as an array with one row for each sample.

    The result is of dtype object if the rows are missing, of several shapes, or no numbers.

    Raises
    ------
    InputError
        If there is no such column.
    """
    names = column_names(batch)
    if name not in names:
        raise InputError(f"the data has no column {name!r}, only {', '.join(map(str, names))}")
    column = batch[name]
    if is_arrow(batch):
        return arrow_to_array(column)
    return as_rows(column.to_numpy() if is_frame(batch) else column)


def as_rows(values: Any) -> Array:
    """Return a sequence of rows as one array, of dtype object if it cannot be one of numbers."""
    array = values if isinstance(values, np.ndarray) else None
    if array is None and hasattr(values, "detach"):
        array = values.detach().cpu().numpy()
    if array is not None and array.dtype != object:
        return array
    rows = list(values)
    try:
        array = np.stack([np.asarray(row) for row in rows]) if rows else None
    except ValueError:  # rows of several shapes
        array = None
    if array is not None and array.dtype.kind in "fiub":
        return array
    array = np.empty(len(rows), dtype=object)
    for i, row in enumerate(rows):
        array[i] = row
    return array


def arrow_to_array(column: Any) -> Array:
    """Return an Arrow column as an array, without a copy of every value as a Python object."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # of no chunks
            column = pa.concat_arrays(column.chunks) if column.chunks else pa.array([], column.type)
    if isinstance(column, pa.FixedShapeTensorArray):
        return np.asarray(column.to_numpy_ndarray())
    if isinstance(column.type, pa.BaseExtensionType):  # such as the tensors of Ray
        return as_rows(column.to_numpy(zero_copy_only=False))
    if pa.types.is_primitive(column.type):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    shape, values = [len(column)], column
    while is_list(values.type) and not values.null_count:
        inner = values.flatten()
        size = len(inner) // max(int(np.prod(shape)), 1)
        if not same_sizes(values, size):
            break
        shape.append(size)
        values = inner
    if pa.types.is_primitive(values.type) and len(values) == np.prod(shape):
        return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(shape)
    return as_rows(np.array([*column.to_pylist(), None], dtype=object)[:-1])


def is_list(kind: Any) -> bool:
    """Return True for Arrow's types of lists."""
    import pyarrow as pa

    types = pa.types
    return bool(types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind))


def same_sizes(lists: Any, size: int) -> bool:
    """Return True if all lists of an Arrow array have this size."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(lists.type):
        return bool(lists.type.list_size == size)
    return bool((np.diff(lists.offsets.to_numpy()) == size).all())


# --- writing ------------------------------------------------------------------------------------


def add_columns(batch: Batch, columns: Mapping[str, Any]) -> Batch:
    """Return a batch of the same kind with more columns.

    Parameters
    ----------
    batch : mapping, DataFrame or Table
    columns : mapping of str to ndarray or list
        Rows of more than one number become lists in a table of pandas or Arrow. Arrow fields hold
        the shape of a row in their metadata.
    """
    if is_arrow(batch):
        return add_to_arrow(batch, columns)
    if is_frame(batch):
        lists = {name: as_lists(values) for name, values in columns.items()}
        return batch.assign(**lists)
    return {**batch, **columns}


def as_lists(values: Any) -> Any:
    """Return rows of several numbers as a list of flat arrays."""
    if isinstance(values, np.ndarray) and values.ndim > 1:
        return list(values.reshape(len(values), -1)) if len(values) else []
    return values


def add_to_arrow(table: Any, columns: Mapping[str, Any]) -> Any:
    """Return an Arrow table with more columns; arrays become lists of a fixed size."""
    import pyarrow as pa

    for name, values in columns.items():
        field, array = arrow_column(name, values)
        table = table.append_column(field, array)
    assert isinstance(table, pa.Table | pa.RecordBatch)
    return table


def arrow_column(name: str, values: Any) -> tuple[Any, Any]:
    """Return the Arrow field and array of a column."""
    import pyarrow as pa

    if not isinstance(values, np.ndarray):
        array = pa.array(values, pa.string())
        return pa.field(name, array.type), array
    if values.ndim == 1:
        array = pa.array(values)
        return pa.field(name, array.type), array
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    shape = values.shape[1:]
    array = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(shape)))
    return pa.field(name, array.type, metadata={SHAPE_KEY: json.dumps(shape)}), array


def table_of(columns: Mapping[str, Array]) -> Any:
    """Return arrays as an Arrow table."""
    import pyarrow as pa

    pairs = [arrow_column(name, values) for name, values in columns.items()]
    return pa.table([array for _, array in pairs], schema=pa.schema([field for field, _ in pairs]))


def shaped_column(table: Any, name: str) -> Array:
    """Return a column of an Arrow table, in the shape that its metadata has."""
    values = arrow_to_array(table.column(name))
    metadata = table.schema.field(name).metadata or {}
    if SHAPE_KEY in metadata and values.dtype != object:
        shape: Sequence[int] = json.loads(metadata[SHAPE_KEY])
        return values.reshape(len(values), *shape)
    return values
