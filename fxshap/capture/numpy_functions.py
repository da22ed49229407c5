"""NumPy functions of tensors, as in ``h * self.window`` where a model holds an array.

NumPy computes them on the values of a tensor, which the fake tensors of a trace do not have. While
a model is captured, torch computes the same. An array is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

#: The method by which NumPy leaves a function to the type of an argument.
OVERRIDE = "__array_ufunc__"

#: What computes functions that torch calls differently. The others have NumPy's names.
RENAMED: dict[str, Callable[..., Any]] = {
    "equal": torch.eq, "power": torch.pow, "rint": torch.round, "invert": torch.bitwise_not,
    "conjugate": torch.conj,
}  # fmt: skip


def as_torch(tensor: Tensor, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Compute a NumPy function of tensors, arrays and numbers by torch."""
    computed = RENAMED.get(function.__name__, getattr(torch, function.__name__, None))
    if method != "__call__" or kwargs or computed is None:
        return NotImplemented
    return computed(*(x if isinstance(x, Tensor) else torch.as_tensor(x) for x in args))


@contextmanager
def numpy_by_torch() -> Iterator[None]:
    """Have NumPy functions of the fake tensors of a trace computed by torch."""
    setattr(FakeTensor, OVERRIDE, as_torch)
    try:
        yield
    finally:
        delattr(FakeTensor, OVERRIDE)
