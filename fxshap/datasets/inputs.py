"""The inputs of a model, read from the columns of a batch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fxshap.datasets.columns import Array, Batch, column_names, is_frame, read_column
from fxshap.errors import InputError, OptionError
from fxshap.frontend.data import as_array, gather

#: The columns of one input: one column of arrays, or several of numbers, which become features.
InputColumns: TypeAlias = str | tuple[str, ...]

NUMERIC = "fiub"  # kinds of NumPy dtypes
NO_NUMBER = "is no number"


@dataclass(frozen=True)
class Background:
    """The references, and the columns that have the same inputs in the data.

    Attributes
    ----------
    arrays : list of ndarray
        One array per input of the model, with the rows first.
    columns : tuple of (str or tuple of str), optional
        The columns of every input; ``None`` if they follow from the columns of a batch.
    """

    arrays: list[Array]
    columns: tuple[InputColumns, ...] | None

    @classmethod
    def of(cls, data: Any, inputs: Any = None) -> Background:
        """Make a background of what the user gives.

        Parameters
        ----------
        data : array, list of arrays, mapping of arrays, DataFrame, Dataset or DataLoader
            The keys of a mapping are the columns of the inputs. The columns of a DataFrame are the
            features of one input.
        inputs : str, or sequence of (str or sequence of str), optional
            The columns of every input.
        """
        columns = None if inputs is None else as_input_columns(inputs)
        if is_frame(data):
            columns = columns or (tuple(data.columns),)
            arrays = [data[name if isinstance(name, str) else list(name)] for name in columns]
        elif isinstance(data, Mapping):
            columns = columns or tuple(data)
            arrays = [data[name] for name in columns if isinstance(name, str)]
        else:
            arrays = gather(data)
        if columns is not None and len(columns) != len(arrays):
            raise OptionError(
                f"inputs names the columns of {len(columns)} inputs, but the background has "
                f"{len(arrays)}"
            )
        return cls([np.array(as_array(x)) for x in arrays], columns)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of a row of every input."""
        return [x.shape[1:] for x in self.arrays]

    @property
    def row_bytes(self) -> int:
        """The bytes of one row of all inputs."""
        return sum(x[:1].nbytes for x in self.arrays)

    def columns_in(self, batch: Batch, others: Collection[str]) -> tuple[InputColumns, ...]:
        """Return the columns of every input.

        Parameters
        ----------
        batch : mapping, DataFrame or Table
        others : collection of str
            Columns that hold no input.

        Raises
        ------
        InputError
            If `columns` is not given and does not follow from the columns of the batch.
        """
        if self.columns is not None:
            return self.columns
        names = [name for name in column_names(batch) if name not in others]
        if len(names) == len(self.arrays):
            return tuple(names)
        if [x.ndim for x in self.arrays] == [2]:
            numeric = [name for name in names if is_numeric(read_column(batch, name))]
            if (len(numeric),) == self.shapes[0]:
                return (tuple(numeric),)
        raise InputError(
            f"the background has inputs of the shapes {', '.join(map(str, self.shapes))}, and the "
            f"data the columns {', '.join(map(str, names))}; name the columns of every input with "
            "inputs=, such as inputs=['image'] or inputs=[['age', 'income']]"
        )


def as_input_columns(inputs: Any) -> tuple[InputColumns, ...]:
    """Return the columns of every input as tuples."""
    if isinstance(inputs, str):
        return (inputs,)
    return tuple(entry if isinstance(entry, str) else tuple(entry) for entry in inputs)


def is_numeric(values: Array) -> bool:
    """Return True if a column holds one number for each row."""
    return values.ndim == 1 and values.dtype.kind in NUMERIC


@dataclass(frozen=True)
class InputRows:
    """The rows of a batch, as arrays.

    Attributes
    ----------
    arrays : list of ndarray
        One array per input, with the rows first. Rows that cannot be explained are zero.
    errors : dict of int to str
        Why rows cannot be explained.
    """

    arrays: list[Array]
    errors: dict[int, str]


def read_inputs(
    batch: Batch, columns: Sequence[InputColumns], shapes: Sequence[tuple[int, ...]]
) -> InputRows:
    """Read the inputs of a model from a batch, and find the rows that cannot be explained.

    Raises
    ------
    InputError
        If a column is missing, or no row of it has the type and the shape of the background.
    """
    arrays: list[Array] = []
    errors: dict[int, str] = {}
    for entry, shape in zip(columns, shapes, strict=True):
        if isinstance(entry, str):
            array, wrong = read_rows(batch, entry, shape)
        else:
            parts = [read_rows(batch, name, ()) for name in entry]
            array = np.stack([part for part, _ in parts], 1)
            wrong = {row: text for _, reasons in parts for row, text in reasons.items()}
            if array.shape[1:] != shape:
                raise InputError(
                    f"an input has the {len(entry)} columns {', '.join(entry)}, but rows of the "
                    f"background have the shape {shape}"
                )
        bad = ~np.isfinite(array.reshape(len(array), math.prod(shape)))
        for row in np.flatnonzero(bad.any(1)):
            name = entry if isinstance(entry, str) else entry[int(bad[row].argmax())]
            wrong.setdefault(int(row), f"{name} contains NaN or infinity")
        if wrong:
            array = array.copy()
            array[list(wrong)] = 0
        arrays.append(array)
        errors = {**wrong, **errors}
    return InputRows(arrays, errors)


def read_rows(
    batch: Batch, name: str, shape: tuple[int, ...] | None
) -> tuple[Array, dict[int, str]]:
    """Return a column as numbers, with the reasons why some of its rows have none.

    Parameters
    ----------
    batch : mapping, DataFrame or Table
    name : str
    shape : tuple of int, optional
        The shape of a row; by default that of the first row. Rows that are flat lists of as many
        numbers are reshaped.
    """
    values = read_column(batch, name)
    errors: dict[int, str] = {}
    if not len(values):  # no row tells the shape, as in an empty block of Ray
        return np.zeros((0, *(shape or ()))), errors
    if values.dtype == object:
        rows = [as_numbers(row) for row in values]
        if shape is None:
            shape = next((row.shape for row in rows if isinstance(row, np.ndarray)), ())
        for i, row in enumerate(rows):
            if isinstance(row, str):
                errors[i] = f"{name} {row}"
            elif not fits(row.shape, shape):
                errors[i] = f"{name} has the shape {row.shape}, not {shape}"
        good = [np.zeros(shape) if i in errors else row for i, row in enumerate(rows)]
        if all(isinstance(row, str) and row == NO_NUMBER for row in rows):
            raise InputError(f"the column {name!r} holds no numbers, but {values[0]!r}")
        stacked = [np.reshape(row, shape) for row in good]
        values = np.stack(stacked)
    elif values.dtype.kind not in NUMERIC:
        raise InputError(f"the column {name!r} holds no numbers, but {values.dtype}")
    if shape is not None and values.shape[1:] != shape:
        if not fits(values.shape[1:], shape):
            raise InputError(
                f"rows of the column {name!r} have the shape {values.shape[1:]}, and rows of the "
                f"background {shape}"
            )
        values = values.reshape(len(values), *shape)
    return values, errors


def as_numbers(row: Any) -> Array | str:
    """Return a row as an array of numbers, or the reason why it is none."""
    if row is None:
        return "is missing"
    array = np.asarray(row)
    if array.dtype.kind in NUMERIC:
        return array
    try:
        return np.asarray(row, dtype=float)  # missing numbers become NaN
    except (TypeError, ValueError):
        return "is missing" if array.ndim == 0 and not isinstance(row, str) else NO_NUMBER


def fits(given: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return True if rows have a shape, or are flat lists of as many numbers."""
    flat = len(given) <= 1 and math.prod(given) == math.prod(shape)
    return given == shape or flat
