"""Features: groups of elements of the inputs that have one Shapley value together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fxshap.errors import InputError, OptionError

FeatureDims = Sequence[int] | Sequence[Sequence[int] | None] | None
FeatureMask = Tensor | NDArray[Any] | Sequence[Tensor | NDArray[Any]] | None


def feature_numbers(
    inputs: Sequence[Tensor], feature_dims: FeatureDims = None, feature_mask: FeatureMask = None
) -> list[Tensor]:
    """Return the number of the feature that every element belongs to.

    Parameters
    ----------
    inputs : sequence of Tensor
        One tensor per input, of shape (rows, ...).
    feature_dims, feature_mask
        As :class:`fxshap.Refinement` takes them.

    Returns
    -------
    list of Tensor
        One tensor of integers per input, which broadcasts to one row of it. The features of all
        inputs are numbered from 0 without gaps.

    Raises
    ------
    InputError
        If `feature_dims` are not dimensions of the inputs, or there are none.
    OptionError
        If `feature_mask` has another number of tensors than there are inputs, or does not
        broadcast to the shape of a row.

    Examples
    --------
    >>> import torch
    >>> tokens = torch.zeros(2, 3, 8)  # rows, tokens, width
    >>> feature_numbers([tokens], feature_dims=(1,))[0].flatten()
    tensor([0, 1, 2])
    """
    if feature_mask is not None:
        return numbers_of_mask(inputs, feature_mask)
    numbers: list[Tensor] = []
    for x, dims in zip(inputs, dims_of_inputs(inputs, feature_dims), strict=True):
        shape = [x.shape[d] if d in dims else 1 for d in range(1, x.dim())]
        first = sum(number.numel() for number in numbers)
        numbers.append(torch.arange(first, first + math.prod(shape)).reshape(1, *shape))
    return numbers


def numbers_of_mask(
    inputs: Sequence[Tensor], feature_mask: NDArray[Any] | Tensor | Sequence[Tensor | NDArray[Any]]
) -> list[Tensor]:
    """Return the numbers of the features that the masks of all inputs define."""
    single = not isinstance(feature_mask, list | tuple)
    masks = [torch.as_tensor(mask) for mask in ([feature_mask] if single else feature_mask)]
    if len(masks) != len(inputs):
        raise OptionError(
            f"feature_mask describes {len(masks)} inputs, but the model has {len(inputs)}"
        )
    shapes = [
        (1,) * (x.dim() - mask.dim()) + tuple(mask.shape)
        for x, mask in zip(inputs, masks, strict=True)
    ]
    rows = [(1, *x.shape[1:]) for x in inputs]
    if any(
        len(shape) != len(row) or any(a not in (1, b) for a, b in zip(shape, row, strict=True))
        for shape, row in zip(shapes, rows, strict=True)
    ):
        raise OptionError(
            f"feature_mask, of shape {[tuple(mask.shape) for mask in masks]}, does not broadcast "
            f"to the shape of one row of the inputs, {[row[1:] for row in rows]}"
        )
    numbers = torch.cat([mask.flatten().cpu() for mask in masks]).unique(return_inverse=True)[1]
    parts = numbers.split([mask.numel() for mask in masks])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def count_features(numbers: Sequence[Tensor]) -> int:
    """Return how many features there are."""
    return 1 + max(int(number.max()) for number in numbers)


def differing_features(
    samples: Sequence[Tensor], references: Sequence[Tensor], numbers: Sequence[Tensor]
) -> Tensor:
    """Return which features differ between the two endpoints of every pair.

    Parameters
    ----------
    samples, references : sequence of Tensor
        One tensor per input, of shapes (rows or 1, ...) and (rows, ...).
    numbers : sequence of Tensor
        The features, from :func:`feature_numbers`.

    Returns
    -------
    Tensor
        Booleans of shape (rows, features), on the CPU.
    """
    count = torch.zeros(len(references[0]), count_features(numbers), dtype=torch.long)
    for x, r, number in zip(samples, references, numbers, strict=True):
        mask = (x != r).cpu()
        within = [d for d in range(1, r.dim()) if number.shape[d] == 1]
        mask = mask.any(within, keepdim=True) if within else mask
        count.index_add_(1, number.flatten(), mask.flatten(1).long())
    return count > 0


def spread_features(values: Tensor, number: Tensor) -> Tensor:
    """Return for the elements of one input what belongs to their features.

    Parameters
    ----------
    values : Tensor
        Of shape (..., features).
    number : Tensor
        The features of the elements, of shape (1, ...).

    Returns
    -------
    Tensor
        Of shape (..., *number.shape[1:]), which broadcasts to rows of the input.
    """
    spread = values[..., number.flatten().to(values.device)]
    return spread.reshape(*values.shape[:-1], *number.shape[1:])


def dims_of_inputs(inputs: Sequence[Tensor], feature_dims: FeatureDims) -> list[tuple[int, ...]]:
    """Return the feature dimensions of every input, counted with the batch as dimension 0."""
    if feature_dims is None:
        return [default_dims(x) for x in inputs]
    if not len(feature_dims):
        raise InputError(
            "feature_dims names no dimensions; give those that index features, such as (1,)"
        )
    given = [feature_dims] if isinstance(feature_dims[0], int) else feature_dims
    if len(given) != len(inputs):
        raise InputError(
            f"feature_dims describes {len(given)} inputs, but the model has {len(inputs)}; give "
            "one sequence of dimensions, or None, for each"
        )
    return [chosen_dims(x, dims) for x, dims in zip(inputs, given, strict=True)]


def default_dims(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions that index features: pixels of an image, else every element."""
    return (2, 3) if x.dim() == 4 else tuple(range(1, x.dim()))


def chosen_dims(x: Tensor, dims: Any) -> tuple[int, ...]:
    """Check the feature dimensions of one input and count them from the front."""
    if dims is None:
        return default_dims(x)
    valid = tuple(d % x.dim() for d in dims if -x.dim() <= d < x.dim())
    if len(valid) != len(dims) or 0 in valid or not valid:
        raise InputError(
            f"feature_dims={tuple(dims)} are not dimensions of an input of shape {tuple(x.shape)} "
            "that index features; dimension 0 is the batch"
        )
    return valid
