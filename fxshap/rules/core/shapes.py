"""Which dimensions a reduction runs over, and how its cotangent gets them back."""

from __future__ import annotations

from torch import Tensor

from fxshap.rules.core.operation import Operation


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
