"""Sparse constants, such as the adjacency matrix of a graph network, in their dense form.

Products with a sparse matrix are products with a matrix of mostly zeros. While a model is captured,
its sparse tensors are replaced by dense ones, and functions of sparse tensors by those of dense
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Marks the dense form of a sparse tensor.
DENSE_FORM = "_fxshap_dense_form"


def is_sparse(value: Any) -> bool:
    """Return True if a value is a sparse tensor, of any layout."""
    return isinstance(value, Tensor) and value.layout is not torch.strided


def is_dense_form(value: Tensor) -> bool:
    """Return True if a tensor replaces a sparse one."""
    return hasattr(value, DENSE_FORM)


def dense_form(value: Tensor) -> Tensor:
    """Return a sparse tensor as a dense one."""
    dense = value.detach().to_dense()
    setattr(dense, DENSE_FORM, True)
    return dense


@contextmanager
def dense_constants(model: nn.Module) -> Iterator[None]:
    """Replace the sparse tensors that the modules of a model hold by dense ones."""
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        stores: Sequence[dict[str, Any]] = (vars(module), module._buffers, module._parameters)
        for store in stores:
            replaced += [(store, name, value) for name, value in store.items() if is_sparse(value)]
    try:
        for store, name, value in replaced:
            store[name] = dense_form(value)
        yield
    finally:
        for store, name, value in replaced:
            store[name] = value


def coo_as_dense(
    indices: Tensor, values: Tensor, size: Sequence[int] | None = None, **options: Any
) -> Tensor:
    """Compute ``torch.sparse_coo_tensor`` as a dense tensor; values at equal indices are added."""
    sizes = tuple((indices.amax(1) + 1).tolist()) if size is None else tuple(size)
    zeros = values.new_zeros(*sizes, *values.shape[1:])
    return zeros.index_put(tuple(indices.unbind(0)), values, accumulate=True)


def itself(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return a tensor as it is."""
    return value


#: What computes the same for dense tensors.
DENSE_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.sparse.mm: torch.mm,
    torch.sparse.addmm: torch.addmm,
    torch.spmm: torch.mm,
    torch.smm: torch.mm,
    torch.dsmm: torch.mm,
    torch.hspmm: torch.mm,
    torch.sparse_coo_tensor: coo_as_dense,
    torch.sparse.sum: torch.sum,
    Tensor.coalesce: itself,
    Tensor.to_dense: itself,
    Tensor.to_sparse: itself,
    Tensor.to_sparse_csr: itself,
}


class DenseForSparse(TorchFunctionMode):
    """Runs functions of sparse tensors on dense ones."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return DENSE_FUNCTIONS.get(func, func)(*args, **(kwargs or {}))
