"""Which dimensions a reduction runs over, and how its cotangent gets them back."""

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
    """Return the dimensions a reduction runs over, counted from the front; all by default."""
    dim = operation.get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or range(value.dim()))
    return sorted(d % value.dim() for d in dims)


def restore_dims(operation: Operation, grad: Tensor, dims: list[int]) -> Tensor:
    """Put reduced dimensions, in ascending order, back as ones."""
    if operation.get("keepdim", False):
        return grad
    for dim in dims:
        grad = grad.unsqueeze(dim)
    return grad


RowLine = Callable[[Tensor, Tensor, Tensor], Tensor]


def lines_of(value: Tensor, dim: int | None) -> Tensor:
    """View as lines along `dim`, or as one line, of which an operation knows no other."""
    if dim is None or not value.dim():
        return value.reshape(1, -1)
    return value.movedim(dim, -1).reshape(-1, value.shape[dim])


def by_lines(
    dim: int | None, far: Tensor, usual: RowLine, other: RowLine, *lines: Tensor, like: Tensor
) -> Tensor:
    """Multiply each line of ``(grad, reference, sample)`` by itself: where `far` by `other`.

    Returned are multipliers in the shape of `like`.
    """
    out = torch.empty_like(lines[1])
    for multiply, chosen in ((usual, ~far), (other, far)):
        if any_or_tracing(chosen):
            out[chosen] = multiply(*(line[chosen] for line in lines))
    if dim is None or not like.dim():
        return out.reshape(like.shape)
    return out.reshape(like.movedim(dim, -1).shape).movedim(-1, dim)


def common_rows(
    reference: Tensors, rows: Sequence[int | None], before: Any, output_row: int | None
) -> int:
    """Number of rows: tensors that fold others into the batch, (N, T) as N * T, count as N."""
    output = before if isinstance(before, Tensor) else before[0]
    pairs = [*zip(reference, rows, strict=True), (output, output_row)]
    sizes = (value.shape[row] if row is not None and value.dim() else 1 for value, row in pairs)
    return math.gcd(*sizes)


def in_rows(value: Tensor, row: int | None, count: int) -> Tensor:
    """View as `count` rows of real numbers, given the batch dimension `row`."""
    first = rows_first(value, row)
    first = torch.view_as_real(first.resolve_conj()) if value.is_complex() else first
    return first.reshape(count, -1)


def out_of_rows(value: Tensor, like: Tensor, row: int | None) -> Tensor:
    """Undo :func:`in_rows` for a value like `like`."""
    first = rows_first(like, row)
    if like.is_complex():
        value = torch.view_as_complex(value.reshape(*first.shape, 2))
    value = value.reshape(first.shape)
    return value if row is None or not like.dim() else value.movedim(0, row)


def rows_first(value: Tensor, row: int | None) -> Tensor:
    """Move the batch dimension, if there is one, to the front."""
    return value if row is None or not value.dim() else value.movedim(row, 0)
