"""A picklable callable that explains batches, for any engine that maps functions over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args
from uuid import uuid4

import numpy as np
from torch import nn

from fxshap.datasets.columns import (
    Array,
    Batch,
    add_columns,
    column_names,
    is_batch,
    row_count,
    take_rows,
)
from fxshap.datasets.inputs import Background, read_inputs, read_rows
from fxshap.datasets.worker import RowExplainer, row_explainer
from fxshap.errors import InputError, OptionError

OnError = Literal["raise", "record"]
StoredDtype = Literal["float32", "float16"]
#: A model, a model with the layer whose input is explained, or a function that returns either.
Model: TypeAlias = (
    nn.Module | tuple[nn.Module, nn.Module] | Callable[[], nn.Module | tuple[nn.Module, nn.Module]]
)

#: The most bytes of attributions that a worker holds, and the most rows.
CHUNK_BYTES = 32 << 20
MAX_CHUNK_ROWS = 8192


@dataclass(frozen=True)
class ExplainedBatch:
    """The attributions of a batch.

    Attributes
    ----------
    names : list of str
        The columns of the values.
    values : list of ndarray
        One array per input, of shape (rows, ..., outputs explained), of the dtype that is stored.
    inputs : list of ndarray
        The explained inputs, of shape (rows, ...).
    columns : dict of str to (ndarray or list)
        All new columns of the batch, by name.
    error : ndarray
        The additivity error of every row, of shape (rows,); NaN for rows with an error.
    reasons : dict of int to str
        Why rows are not explained.
    base_values : ndarray
        The expected values of the explained outputs, of shape (rows, outputs explained).
    """

    names: list[str]
    values: list[Array]
    inputs: list[Array]
    columns: dict[str, Any]
    error: Array
    reasons: dict[int, str]
    base_values: Array


class BatchExplainer:
    """Adds attributions to batches of samples: a callable that engines can send to their workers.

    It takes a dict of arrays, a ``pandas.DataFrame`` or a ``pyarrow.Table``, and returns the same
    with more columns. It also takes an iterator of batches, and returns an iterator. The model and
    its explainer are built once in every process.

    Parameters
    ----------
    model : nn.Module, ExplainableModule, (nn.Module, nn.Module) or callable
        The model to explain, as :class:`fxshap.DeepExplainer` takes it, or a function without
        arguments that returns it, which every worker calls once.
    background : array, list of arrays, mapping of arrays, DataFrame, Dataset or DataLoader
        The references. The keys of a mapping are the columns of the inputs in the data; the columns
        of a DataFrame are the features of one input.
    inputs : str, or sequence of (str or sequence of str), optional
        The column of every input; several columns of numbers become the features of one input. By
        default those of the background. If it has no names, all columns of the data, one for each
        input, or all columns of numbers as the features of one.
    arguments : mapping of str to str, optional
        Columns with other arguments of the model, by argument: one row for each sample.
    outputs : sequence of int or str, optional
        The outputs to explain, the same for all samples, or the column that has the output or
        outputs of each sample. By default all.
    ranked_outputs : int, optional
        Explain this many of the largest outputs of each sample instead.
    id_column : str, optional
        The column that identifies rows in messages.
    on_error : "raise" or "record"
        What to do with a row that cannot be explained, for example because it contains NaN: stop,
        or record the reason in the column ``error`` and give it attributions of NaN.
    dtype : "float32" or "float16"
        The dtype of the new columns.
    prefix : str
        Begins the names of the new columns.
    batch_size : int or "auto"
        How many samples go through the model together.
    device : str
        Where the model runs. By default on a GPU if the worker has one.
    **options
        The options of :func:`fxshap.make_explainable`.

    Raises
    ------
    OptionError
        If an option has a value that it cannot have.

    Notes
    -----
    The new columns are

    ``shap_values``
        The attributions, of shape (..., outputs explained). With several inputs, there is one
        column for each, ``shap_values_`` and its name. In tables they are flat lists in C order,
        and the metadata of an Arrow field has the shape.
    ``base_values``, ``model_output``
        The expected values and the model's outputs, of shape (outputs explained,).
    ``additivity_error``
        By how much ``shap_values`` and ``base_values`` miss ``model_output``, as they are stored:
        the largest of the explained outputs, relative to the largest absolute output of this row or
        of the background.
    ``explained_outputs``
        The outputs of this row, if rows may have different ones.
    ``error``
        Why the row is not explained, with ``on_error="record"``.

    Examples
    --------
    >>> import pandas, torch
    >>> from fxshap.datasets import BatchExplainer
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.GELU(), torch.nn.Linear(4, 1))
    >>> background = pandas.DataFrame({"age": [20.0, 40.0], "income": [1.0, 3.0]})
    >>> explain = BatchExplainer(model, background, on_error="record")
    >>> rows = pandas.DataFrame({"id": ["a", "b"], "age": [30.0, None], "income": [2.0, 2.0]})
    >>> explained = explain(rows)
    >>> list(explained.columns)[3:]
    ['shap_values', 'base_values', 'model_output', 'additivity_error', 'error']
    >>> [None if isinstance(text, float) else text for text in explained["error"]]
    [None, 'age contains NaN or infinity']
    """

    def __init__(
        self,
        model: Model,
        background: Any,
        *,
        inputs: Any = None,
        arguments: Mapping[str, str] | None = None,
        outputs: Sequence[int] | str | None = None,
        ranked_outputs: int | None = None,
        id_column: str | None = None,
        on_error: OnError = "raise",
        dtype: StoredDtype = "float32",
        prefix: str = "",
        batch_size: int | Literal["auto"] = "auto",
        device: str = "auto",
        **options: Any,
    ) -> None:
        for name, value, kind in (("on_error", on_error, OnError), ("dtype", dtype, StoredDtype)):
            if value not in get_args(kind):
                allowed = " or ".join(map(repr, get_args(kind)))
                raise OptionError(f"{name} is {allowed}, not {value!r}")
        if outputs is not None and ranked_outputs is not None:
            raise OptionError("ranked_outputs chooses the outputs; leave out outputs")
        self.model = model
        self.background = Background.of(background, inputs)
        self.arguments = dict(arguments or {})
        self.outputs = outputs if outputs is None or isinstance(outputs, str) else list(outputs)
        self.ranked_outputs = ranked_outputs
        self.id_column = id_column
        self.on_error: OnError = on_error
        self.dtype: StoredDtype = dtype
        self.prefix = prefix
        self.batch_size = batch_size
        self.device = device
        self.options = options
        self._key = uuid4().hex  # what a process that has built the model finds it by

    def __call__(self, batch: Batch) -> Batch:
        """Return a batch with attributions, or an iterator of such batches.

        Parameters
        ----------
        batch : mapping, DataFrame, Table, or iterator of these

        Raises
        ------
        InputError
            If the columns do not match the background, or, with ``on_error="raise"``, a row cannot
            be explained.
        AdditivityError
            If the attributions of a row do not sum to the difference of the outputs.
        """
        if is_batch(batch):
            return add_columns(batch, self.explain(batch).columns)
        if isinstance(batch, Iterator):
            return map(self, batch)
        raise InputError(
            f"a batch is a mapping of arrays, a DataFrame or an Arrow table, not a "
            f"{type(batch).__name__}"
        )

    def __dask_tokenize__(self) -> object:
        return type(self).__name__, self._key

    def explain(self, batch: Batch, first_row: int | None = None) -> ExplainedBatch:
        """Return the attributions of a batch as arrays.

        Parameters
        ----------
        batch : mapping, DataFrame or Table
        first_row : int, optional
            The index of the first row in the data set, for messages, if it is known.
        """
        taken = (self.id_column, self.outputs, *self.arguments.values())
        others = {name for name in taken if isinstance(name, str)}
        columns = self.background.columns_in(batch, others)
        names = self._names(batch, columns)
        rows = read_inputs(batch, columns, self.background.shapes)
        arguments = {}
        errors = dict(rows.errors)
        for argument, column in self.arguments.items():
            arguments[argument], wrong = read_rows(batch, column, None)
            errors = {**wrong, **errors}
        outputs: Any = self.outputs
        if isinstance(outputs, str):
            outputs, wrong = read_outputs(batch, outputs)
            errors = {**wrong, **errors}

        def where(row: int) -> str:
            return self.where(batch, row, first_row)

        if errors and self.on_error == "raise":
            first: int = min(errors)
            raise InputError(
                f"{where(first)} cannot be explained: {errors[first]}; impute or drop such rows, "
                "or record them with on_error='record'"
            )
        result = self.row_explainer().explain(rows.arrays, arguments, outputs, errors, where)
        values = [self._store(v, where) for v in result.values]
        base_values, output = self._store(result.expected), self._store(result.output)
        error = result.relative_errors(values, base_values, output)
        new: dict[str, Any] = dict(zip(names, values, strict=True))
        new[f"{self.prefix}base_values"] = base_values
        new[f"{self.prefix}model_output"] = output
        new[f"{self.prefix}additivity_error"] = error.astype(np.float32)
        if isinstance(self.outputs, str) or self.ranked_outputs is not None:
            new[f"{self.prefix}explained_outputs"] = result.columns
        if self.on_error == "record":
            reasons = [result.reasons.get(i) for i in range(row_count(batch))]
            new[f"{self.prefix}error"] = reasons
        return ExplainedBatch(names, values, rows.arrays, new, error, result.reasons, base_values)

    def row_explainer(self) -> RowExplainer:
        """Return what explains rows, which is built once in every process."""
        return row_explainer(self._key, self._build)

    def rows_at_once(self, batch: Batch, first_row: int | None = None) -> int:
        """Return how many rows of data like this batch to explain at once, by their size."""
        explainer = self.row_explainer()
        if explainer.template is None:
            self.explain(take_rows(batch, 0, 1), first_row)
        assert explainer.template is not None
        size = sum(v[:1].nbytes for v in explainer.template.values)
        return int(min(max(CHUNK_BYTES // max(size, 1), 1), MAX_CHUNK_ROWS))

    def where(self, batch: Batch, row: int, first_row: int | None = None) -> str:
        """Return the name of a row for messages."""
        name = f"row {row} of the batch" if first_row is None else f"row {first_row + row}"
        if self.id_column is None:
            return name
        value = batch[self.id_column]
        value = value.iloc[row] if hasattr(value, "iloc") else value[row]
        return f"{name} ({self.id_column} {value})"

    def _build(self) -> RowExplainer:
        return RowExplainer.build(
            self.model,
            self.background.arrays,
            batch_size=self.batch_size,
            device=self.device,
            ranked_outputs=self.ranked_outputs,
            record=self.on_error == "record",
            options=self.options,
        )

    def _names(self, batch: Batch, columns: Sequence[Any]) -> list[str]:
        """Return the names of the columns with attributions, which the batch must not have."""
        single = len(columns) == 1
        suffixes = [
            "" if single else f"_{entry if isinstance(entry, str) else position}"
            for position, entry in enumerate(columns)
        ]
        names = [f"{self.prefix}shap_values{suffix}" for suffix in suffixes]
        others = ("base_values", "model_output", "additivity_error", "explained_outputs", "error")
        there = {*names, *(f"{self.prefix}{name}" for name in others)} & set(column_names(batch))
        if there:
            raise OptionError(
                f"the data has the column {min(there)!r} already; choose other names with prefix="
            )
        return names

    def _store(self, values: Array, where: Callable[[int], str] | None = None) -> Array:
        """Return values in the dtype that is stored.

        Raises
        ------
        OptionError
            If a value is too large for the dtype.
        """
        with np.errstate(over="ignore"):
            stored = values.astype(self.dtype)
        lost = np.isinf(stored) & np.isfinite(values)
        if lost.any():
            row = int(lost.reshape(len(lost), -1).any(1).argmax())
            name = where(row) if where else f"row {row}"
            raise OptionError(f"{name} has values that are too large for {self.dtype}")
        return stored


def read_outputs(batch: Batch, column: str) -> tuple[Array, dict[int, str]]:
    """Return the outputs to explain of every row, with the reasons why some rows have none."""
    chosen, errors = read_rows(batch, column, None)
    chosen = chosen.reshape(len(chosen), math.prod(chosen.shape[1:]))
    for row in np.flatnonzero((chosen != np.round(chosen)).any(1)):  # NaN is unequal, too
        errors.setdefault(int(row), f"{column} is no integer")
    chosen = np.where(np.isin(np.arange(len(chosen)), list(errors))[:, None], 0, chosen)
    return chosen.astype(np.int64), errors
