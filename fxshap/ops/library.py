"""Every operator that fxshap registers with ``torch.library``.

- ``fxshap::batch_norm``: batch norm in evaluation mode, as one operation.
- ``fxshap::step``: a comparison with 0, as 0/1 floats.
- ``fxshap::select``: ``torch.where`` for a condition of 0/1 floats.
- ``fxshap::ranks``: the element of each rank, as one-hot vectors.
- ``fxshap::one_hot_position``: an integer, as a one-hot vector.
- ``fxshap::grouped_mm``: groups of rows, each times a matrix of its own.

Floats take the place of booleans and integers because autograd gives those no gradient. PyTorch's
own product of groups can be captured only in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

LIBRARY = torch.library.Library("fxshap", "FRAGMENT")
LIBRARY.define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps)"
    " -> Tensor"
)
LIBRARY.define("step(Tensor difference, str relation) -> Tensor")
LIBRARY.define("select(Tensor condition, Tensor a, Tensor b) -> Tensor")
LIBRARY.define("ranks(Tensor scores, str order, int lowest, int count) -> Tensor")
LIBRARY.define("one_hot_position(Tensor position, int size) -> Tensor")
LIBRARY.define("grouped_mm(Tensor rows, Tensor weights, Tensor offsets) -> Tensor")

RELATIONS = {
    "gt": torch.gt,
    "ge": torch.ge,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
}

#: The indices of ranks lowest, lowest + 1, ... over the last dimension. They come from torch's own
#: operations because each of these breaks ties in its own way.
RANK_INDICES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "argmax": lambda s, lowest, count: s.argmax(-1, keepdim=True),
    "argmin": lambda s, lowest, count: s.argmin(-1, keepdim=True),
    "max": lambda s, lowest, count: s.max(-1, keepdim=True).indices,
    "min": lambda s, lowest, count: s.min(-1, keepdim=True).indices,
    "topk": lambda s, lowest, count: s.topk(count).indices,
    "least": lambda s, lowest, count: s.topk(count, largest=False).indices,
    "descending": lambda s, lowest, count: s.sort(descending=True, stable=True).indices,
    "ascending": lambda s, lowest, count: s.sort(stable=True).indices,
    "kth": lambda s, lowest, count: s.kthvalue(lowest + 1, keepdim=True).indices,
}


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Batch norm in evaluation mode."""
    return functional.batch_norm(x, mean, var, weight, bias, eps=eps)


def step(difference: Tensor, relation: str) -> Tensor:
    """1 where ``difference relation 0`` holds, else 0, in the dtype of `difference`."""
    return RELATIONS[relation](difference, 0).to(difference.dtype)


def select(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a` where `condition` is 1, `b` where it is 0."""
    return torch.where(condition > 0.5, a, b)


def one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return indices as 0/1 floats over a new last dimension of `size` candidates."""
    return (index.unsqueeze(-1) == torch.arange(size, device=index.device)).to(dtype)


def ranks(scores: Tensor, order: str, lowest: int, count: int) -> Tensor:
    """Return which element has each rank, one-hot: scores of shape (..., n) to (..., count, n)."""
    index = RANK_INDICES[order](scores, lowest, count)
    return one_hot(index, scores.shape[-1], scores.dtype)


def one_hot_position(position: Tensor, size: int) -> Tensor:
    """Return integers, held by floats, as one-hot vectors; negative ones count from the end."""
    return one_hot(position.round().long() % size, size, position.dtype)


def grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows from ``offsets[k - 1]`` to ``offsets[k]`` by ``weights[k]``."""
    out = rows.new_zeros(rows.shape[0], weights.shape[2])
    start = 0
    for end, weight in zip(offsets.tolist(), weights, strict=True):
        out[start:end] = rows[start:end] @ weight
        start = end
    return out


for _function in (batch_norm, step, select, ranks, one_hot_position, grouped_mm):
    LIBRARY.impl(_function.__name__, _function, "CompositeExplicitAutograd")
LIBRARY.impl("batch_norm", lambda x, *rest: torch.empty_like(x), "Meta")
LIBRARY.impl("grouped_mm", lambda rows, w, _: rows.new_empty(rows.shape[0], w.shape[2]), "Meta")

#: Batch norm in evaluation mode, as one operation; :mod:`fxshap.ops.frozen` runs it.
BATCH_NORM = torch.ops.fxshap.batch_norm.default
