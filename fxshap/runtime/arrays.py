"""Attributions as NumPy arrays, and whether they sum to the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxshap.errors import AdditivityError
from fxshap.ops.dtypes import ADDITIVITY_TOLERANCES
from fxshap.runtime.attributions import Attributions

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ArrayAttributions:
    """The attributions of some samples, as NumPy arrays.

    Attributes
    ----------
    values : list of ndarray
        One array per input, of shape (samples, ..., outputs explained).
    expected : ndarray
        The expected value of every explained output, of shape (samples, outputs explained).
    output : ndarray
        The model's explained outputs for the samples, of shape (samples, outputs explained).
    columns : ndarray
        The explained outputs, of shape (samples, outputs explained).
    """

    values: list[Array]
    expected: Array
    output: Array
    columns: Array

    @property
    def errors(self) -> Array:
        """By how much the attributions miss the outputs, of shape (samples, outputs explained)."""
        return additivity_errors(self.values, self.expected, self.output)


def additivity_errors(values: Sequence[Array], expected: Array, output: Array) -> Array:
    """Return by how much attributions and expected values miss the outputs, summed in float64."""
    sums = sum(v.sum(tuple(range(1, v.ndim - 1)), dtype=np.float64) for v in values)
    errors: Array = np.abs(sums + expected.astype(np.float64) - output.astype(np.float64))
    return errors


def concatenate_batches(
    parts: Sequence[Attributions], columns: Tensor, samples: Sequence[int]
) -> ArrayAttributions:
    """Return the attributions of all batches.

    Parameters
    ----------
    parts : sequence of Attributions
    columns : Tensor
        The outputs explained of each sample, of shape (samples, outputs explained).
    samples : sequence of int
        Which sample each row of the batches is.
    """
    order = torch.tensor(samples).argsort()

    def concatenate(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))[order.to(tensors[0].device)]

    values = [concatenate(x).cpu().numpy() for x in zip(*(p.values for p in parts), strict=True)]
    expected = concatenate([p.expected.expand(len(p.output), -1) for p in parts])
    output = concatenate([p.output for p in parts])
    at_columns = [x.gather(1, columns).cpu().numpy() for x in (expected, output)]
    return ArrayAttributions(values, at_columns[0], at_columns[1], columns.cpu().numpy())


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest additivity error that rounding explains, relative to the outputs."""
    return ADDITIVITY_TOLERANCES.get(dtype, max(ADDITIVITY_TOLERANCES.values()))


def check_sums(result: ArrayAttributions, dtype: torch.dtype) -> None:
    """Raise unless attributions and expected value sum to the output of every sample."""
    errors = result.errors
    scale = max(np.abs(result.output).max(initial=0), np.abs(result.expected).max(initial=0))
    if errors.size and not errors.max() <= tolerance(dtype) * scale:
        row, column = np.unravel_index(int(errors.argmax()), errors.shape)
        raise AdditivityError(
            f"the attributions of output {result.columns[row, column]} of sample {row} do not sum "
            f"to the difference of the outputs: the error is {errors.max():.1e}, and the largest "
            f"output {scale:.1e}; fxshap.verify names the operation that leaks"
        )
