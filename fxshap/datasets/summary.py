"""What is known of all rows at the end: mean attributions, errors, and a random sample of rows."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shap

from fxshap.datasets.batch import ExplainedBatch
from fxshap.datasets.columns import Array
from fxshap.datasets.parts import temporary_file

#: How many rows the random sample has, and the most bytes that they may take.
SAMPLE_ROWS = 1000
SAMPLE_BYTES = 64 << 20
#: How many rows that are not explained are listed with the reason.
MAX_LISTED = 1000


@dataclass
class RefusedRow:
    """A row that is not explained.

    Attributes
    ----------
    row : int
        Its index in the data set.
    name : str
        Its name for messages, with its id.
    reason : str
    """

    row: int
    name: str
    reason: str


@dataclass
class Sample:
    """Rows that are drawn at random.

    A row is drawn if a random number, which follows from its index, is among the smallest. So the
    same rows are drawn however the data set is divided, and samples can be merged.

    Attributes
    ----------
    priorities : ndarray
        The random numbers in [0, 1), ascending.
    rows : ndarray
        The indices of the rows.
    values, inputs : list of ndarray
        One array per input of the model.
    base_values : ndarray
    """

    priorities: Array
    rows: Array
    values: list[Array]
    inputs: list[Array]
    base_values: Array

    def smallest(self, count: int, below: float = 1.0) -> Sample:
        """Return the rows of the smallest priorities, below a limit."""
        order = np.argsort(self.priorities, kind="stable")
        order = order[self.priorities[order] < below][:count]
        return Sample(
            self.priorities[order],
            self.rows[order],
            [v[order] for v in self.values],
            [x[order] for x in self.inputs],
            self.base_values[order],
        )

    def join(self, other: Sample) -> Sample:
        """Return the rows of both."""
        return Sample(
            np.concatenate([self.priorities, other.priorities]),
            np.concatenate([self.rows, other.rows]),
            [np.concatenate(pair) for pair in zip(self.values, other.values, strict=True)],
            [np.concatenate(pair) for pair in zip(self.inputs, other.inputs, strict=True)],
            np.concatenate([self.base_values, other.base_values]),
        )


@dataclass
class Summary:
    """A summary of explained rows, which can be merged with that of other rows.

    Attributes
    ----------
    rows, refused : int
        The number of all rows, and of those that are not explained.
    largest_error : float
        The largest additivity error of all rows, relative to the outputs.
    largest_error_row : int or None
        The row that has it.
    refused_rows : list of RefusedRow
        The first rows that are not explained.
    absolute_sums : list of ndarray
        The sums of absolute attributions, one array per input, of shape (..., outputs explained).
    sample : Sample or None
        Rows drawn at random.
    sample_rows : int
        The size of that sample.
    below : float
        Rows whose random number is not below this are never drawn. It bounds the sample of a part,
        of which only a share is drawn at the end.
    """

    rows: int = 0
    refused: int = 0
    largest_error: float = 0.0
    largest_error_row: int | None = None
    refused_rows: list[RefusedRow] = field(default_factory=list)
    absolute_sums: list[Array] = field(default_factory=list)
    sample: Sample | None = None
    sample_rows: int = SAMPLE_ROWS
    below: float = 1.0

    @property
    def explained(self) -> int:
        """The number of rows that are explained."""
        return self.rows - self.refused

    @property
    def mean_abs(self) -> list[Array]:
        """The mean absolute attributions, one array per input, of shape (..., outputs)."""
        return [sums / max(self.explained, 1) for sums in self.absolute_sums]

    def add(self, batch: ExplainedBatch, start: int, names: Sequence[str] | None = None) -> None:
        """Add the rows of a batch.

        Parameters
        ----------
        batch : ExplainedBatch
        start : int
            The index of its first row in the data set.
        names : sequence of str, optional
            The names of its rows that are not explained, in ascending order.
        """
        refused = sorted(batch.reasons)
        listed = names or [f"row {start + row}" for row in refused]
        rows = np.setdiff1d(np.arange(len(batch.error)), refused)
        values = [v[rows] for v in batch.values]
        indices = rows + start
        sample = Sample(
            random_numbers(indices),
            indices,
            values,
            [x[rows] for x in batch.inputs],
            batch.base_values[rows],
        )
        worst = int(np.argmax(batch.error[rows])) if len(rows) else 0
        self.merge(
            Summary(
                rows=len(batch.error),
                refused=len(refused),
                largest_error=float(batch.error[rows][worst]) if len(rows) else 0.0,
                largest_error_row=int(indices[worst]) if len(rows) else None,
                refused_rows=[
                    RefusedRow(start + row, name, batch.reasons[row])
                    for row, name in zip(refused, listed, strict=True)
                ],
                absolute_sums=[np.abs(v).sum(0, dtype=np.float64) for v in values],
                sample=sample,
            )
        )

    def merge(self, other: Summary) -> None:
        """Add the rows of another summary."""
        self.rows += other.rows
        self.refused += other.refused
        if self.largest_error_row is None or other.largest_error > self.largest_error:
            self.largest_error = other.largest_error
            self.largest_error_row = other.largest_error_row
        self.refused_rows = [*self.refused_rows, *other.refused_rows][:MAX_LISTED]
        if other.sample is None:
            return
        if self.sample is None:
            self.absolute_sums = other.absolute_sums
            sample = other.sample
        else:
            pairs = zip(self.absolute_sums, other.absolute_sums, strict=True)
            self.absolute_sums = [a + b for a, b in pairs]
            sample = self.sample.join(other.sample)
        count = min(self.sample_rows, SAMPLE_BYTES // max(row_bytes(sample), 1))
        self.sample = sample.smallest(count, self.below)

    def explanation(
        self, feature_names: Sequence[str] | None = None, output_names: Sequence[str] | None = None
    ) -> Any:
        """Return the rows drawn at random, for SHAP's plots.

        Returns
        -------
        shap.Explanation or list of shap.Explanation
            One for each input. Outputs are the last dimension of the values, if there are several.

        Raises
        ------
        ValueError
            If no row is explained.
        """
        if self.sample is None or not self.explained:
            raise ValueError("no row is explained")
        single = self.sample.base_values.shape[1] == 1
        base_values = self.sample.base_values[:, 0] if single else self.sample.base_values
        explanations = [
            shap.Explanation(
                values=v[..., 0] if single else v,
                base_values=base_values,
                data=x,
                feature_names=None if feature_names is None else list(feature_names),
                output_names=None if output_names is None else list(output_names),
            )
            for v, x in zip(self.sample.values, self.sample.inputs, strict=True)
        ]
        return explanations[0] if len(explanations) == 1 else explanations

    # --- on disk --------------------------------------------------------------------------------

    def save(self, file: Path) -> None:
        """Write the summary to a ``.npz`` file, which appears when it is complete."""
        facts = {name: getattr(self, name) for name in FACTS}
        facts["refused_rows"] = [asdict(row) for row in self.refused_rows]
        arrays: dict[str, Any] = {f"sums_{i}": x for i, x in enumerate(self.absolute_sums)}
        if self.sample is not None:
            arrays |= {name: getattr(self.sample, name) for name in PLAIN}
            arrays |= {f"values_{i}": x for i, x in enumerate(self.sample.values)}
            arrays |= {f"inputs_{i}": x for i, x in enumerate(self.sample.inputs)}
        stream = io.BytesIO()
        np.savez(stream, facts=np.array(json.dumps(facts)), **arrays)
        write_file(file, stream.getvalue())

    @classmethod
    def load(cls, file: Path) -> Summary:
        """Read a summary from a ``.npz`` file."""
        with np.load(file) as saved:
            arrays = {name: saved[name] for name in saved.files}
        facts = json.loads(str(arrays.pop("facts")))
        facts["refused_rows"] = [RefusedRow(**row) for row in facts["refused_rows"]]

        def numbered(prefix: str) -> list[Array]:
            names = [name for name in arrays if name.startswith(prefix)]
            return [arrays[f"{prefix}{i}"] for i in range(len(names))]

        sample = None
        if "rows" in arrays:
            sample = Sample(
                arrays["priorities"],
                arrays["rows"],
                numbered("values_"),
                numbered("inputs_"),
                arrays["base_values"],
            )
        return cls(**facts, absolute_sums=numbered("sums_"), sample=sample)


FACTS = ("rows", "refused", "largest_error", "largest_error_row", "sample_rows", "below")
PLAIN = ("priorities", "rows", "base_values")


def random_numbers(indices: Array) -> Array:
    """Return a random number in [0, 1) for every index, always the same one.

    This is the output function of SplitMix64 (Steele, Lea and Flood 2014).
    """
    x = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    numbers: Array = (x >> np.uint64(11)) * 2.0**-53
    return numbers


def row_bytes(sample: Sample) -> int:
    """Return the bytes of one row of a sample."""
    return sum(x[:1].nbytes for x in (*sample.values, *sample.inputs))


def write_file(file: Path, content: bytes) -> None:
    """Write a file, under its name only when it is complete and on disk."""
    temporary = temporary_file(file.parent)
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
