"""Functions of large tensors, computed block by block in the caches of a processor.

A chain of elementwise operations moves every intermediate value through the main memory, and the
system clears the pages of every new tensor. Blocks of rows stay in the caches, and their memory is
used again. Only the result is as large as the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from fxshap.rules.core.tracing import is_tracing_rules

#: Elements of the largest tensor of a block. In float32 it is as large as the cache of a core.
BLOCK_ELEMENTS = ContextVar("block elements", default=2**18)


@contextmanager
def smallest_blocks() -> Iterator[None]:
    """Make blocks of one row, to measure the tensors that are not computed in blocks."""
    token = BLOCK_ELEMENTS.set(1)
    try:
        yield
    finally:
        BLOCK_ELEMENTS.reset(token)


def in_blocks(
    function: Callable[..., Tensor], *values: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``function(*values)``, computed for blocks of the first dimension.

    Parameters
    ----------
    function : callable
        Returns a tensor of the shape to which its arguments broadcast. A row of it, in the first
        dimension, depends on that row of the arguments only.
    *values : Tensor
        On a GPU, and while rules are traced, `function` is called once for all of them.
    dtype : torch.dtype, optional
        Of the result; by default that of the first value.
    """
    shape = torch.broadcast_shapes(*(value.shape for value in values))
    rows = shape[0] if shape else 1
    size = BLOCK_ELEMENTS.get() * rows // max(shape.numel(), 1)
    if size >= rows or not values[0].is_cpu or is_tracing_rules():
        return function(*values)
    size = max(size, 1)
    out = values[0].new_empty(shape, dtype=dtype)
    for start in range(0, rows, size):
        block = slice(start, start + size)
        # Values of one row, or without the first dimension, belong to every block.
        whole = (value.dim() < len(shape) or len(value) == 1 for value in values)
        parts = [v if w else v[block] for v, w in zip(values, whole, strict=True)]
        out[block] = function(*parts)
    return out
