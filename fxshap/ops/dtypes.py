"""The floating-point type that the rules compute in, and predicates of dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxshap._compat import existing_dtypes

#: The largest additivity error that the rounding of a deep network explains, by dtype.
ADDITIVITY_TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-2,
    torch.bfloat16: 0.2,
}

#: The type in which rules compute values of a low-precision type.
ACCUMULATE_IN = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    **dict.fromkeys(existing_dtypes("complex32", "bcomplex32"), torch.complex64),
}


def runs_in_every_dtype(target: Any) -> bool:
    """Return True if an operator runs in all floating-point types; a user's own may not."""
    return getattr(target, "namespace", "aten") in ("aten", "prims", "fxshap")


def accumulating(value: Any) -> Any:
    """Return a tensor or a dtype in the type that rules compute in; anything else unchanged."""
    if isinstance(value, torch.dtype):
        return ACCUMULATE_IN.get(value, value)
    low_precision = isinstance(value, Tensor) and value.dtype in ACCUMULATE_IN
    return value.to(ACCUMULATE_IN[value.dtype]) if low_precision else value


def differentiable(value: Tensor) -> bool:
    """Return True if autograd gives gradients to tensors of this dtype."""
    return value.is_floating_point() or value.is_complex()


def is_floating(value: Any) -> bool:
    """Return True if a value is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()
