"""Views of tensors for rules: reduced dimensions, slices along a dimension, rows of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors
from fxshap.rules.core.tracing import any_or_tracing


def reduced_dims(operation: Operation, value: Tensor) -> list[int]:
    """Return the dimensions of a reduction, counted from the front; by default all."""
    dim = operation.get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or range(value.dim()))
    return sorted(d % value.dim() for d in dims)


def restore_dims(operation: Operation, grad: Tensor, dims: list[int]) -> Tensor:
    """Put reduced dimensions, in ascending order, back as ones."""
    if operation.get("keepdim", False):
        return grad
    return unsqueeze_dims(grad, dims)


def unsqueeze_dims(value: Tensor, dims: Sequence[int]) -> Tensor:
    """Insert dimensions of size 1 at `dims`, which are in ascending order."""
    for dim in dims:
        value = value.unsqueeze(dim)
    return value


#: From the cotangents, references and samples of some slices to their multipliers.
SliceRule = Callable[[Tensor, Tensor, Tensor], Tensor]


def slices_along(value: Tensor, dim: int | None) -> Tensor:
    """View as slices along `dim`, of shape (slices, size); without `dim` as a single slice."""
    if dim is None or not value.dim():
        return value.reshape(1, -1)
    return value.movedim(dim, -1).reshape(-1, value.shape[dim])


def apply_by_slice(
    dim: int | None,
    condition: Tensor,
    if_false: SliceRule,
    if_true: SliceRule,
    *slices: Tensor,
    like: Tensor,
) -> Tensor:
    """Return the multipliers of each slice, by one of two rules.

    Parameters
    ----------
    dim : int, optional
        As for :func:`slices_along`.
    condition : Tensor
        Booleans that choose the rule of each slice, of shape (slices,).
    if_false, if_true : callable
        The two rules.
    *slices : Tensor
        Cotangents, references and samples, as :func:`slices_along` returns them.
    like : Tensor
        Has the shape of the result.
    """
    out = torch.empty_like(slices[1])
    for backward, chosen in ((if_false, ~condition), (if_true, condition)):
        if any_or_tracing(chosen):
            out[chosen] = backward(*(part[chosen] for part in slices))
    if dim is None or not like.dim():
        return out.reshape(like.shape)
    return out.reshape(like.movedim(dim, -1).shape).movedim(-1, dim)


def common_batch_size(
    reference: Tensors, rows: Sequence[int | None], before: Any, output_row: int | None
) -> int:
    """Return the number of rows that the arguments and the output have in common.

    A tensor that folds another dimension into the batch, such as (N, T) as N * T, counts as N.
    """
    output = before if isinstance(before, Tensor) else before[0]
    pairs = [*zip(reference, rows, strict=True), (output, output_row)]
    sizes = (value.shape[row] if row is not None and value.dim() else 1 for value, row in pairs)
    return math.gcd(*sizes)


def flatten_rows(value: Tensor, row: int | None, count: int) -> Tensor:
    """View as `count` rows of real numbers, given the batch dimension `row`."""
    first = batch_first(value, row)
    first = torch.view_as_real(first.resolve_conj()) if value.is_complex() else first
    return first.reshape(count, -1)


def unflatten_rows(value: Tensor, like: Tensor, row: int | None) -> Tensor:
    """Undo :func:`flatten_rows` for a value of the shape and dtype of `like`."""
    first = batch_first(like, row)
    if like.is_complex():
        pairs = value.reshape(*first.shape, 2)
        value = torch.complex(pairs[..., 0], pairs[..., 1])  # of any strides
    value = value.reshape(first.shape)
    return value if row is None or not like.dim() else value.movedim(0, row)


def batch_first(value: Tensor, row: int | None) -> Tensor:
    """Move the batch dimension `row`, if there is one, to the front."""
    return value if row is None or not value.dim() else value.movedim(row, 0)
