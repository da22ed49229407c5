"""Which floating-point type the rules compute in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: In which type rules compute what is of one with few digits, and a small range.
ACCUMULATE_IN = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}


def runs_in_every_dtype(target: Any) -> bool:
    """Say whether an operator runs in all floating-point types, as a user's own may not."""
    return getattr(target, "namespace", "aten") in ("aten", "prims", "fxshap")


def accumulating(value: Any) -> Any:
    """Return a tensor or a type in which rules compute, and anything else as it is."""
    if isinstance(value, torch.dtype):
        return ACCUMULATE_IN.get(value, value)
    narrow = isinstance(value, Tensor) and value.dtype in ACCUMULATE_IN
    return value.to(ACCUMULATE_IN[value.dtype]) if narrow else value


def differentiable(value: Tensor) -> bool:
    """Say whether autograd can follow a tensor of this dtype."""
    return value.is_floating_point() or value.is_complex()


def is_floating(value: Any) -> bool:
    """Return True if a value is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()
