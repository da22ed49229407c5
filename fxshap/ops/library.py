"""Every operator that fxshap registers with `torch.library`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LIBRARY = torch.library.Library("fxshap", "FRAGMENT")
LIBRARY.define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps)"
    " -> Tensor"
)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Batch norm in evaluation mode."""
    return functional.batch_norm(x, mean, var, weight, bias, eps=eps)


LIBRARY.impl("batch_norm", batch_norm, "CompositeExplicitAutograd")
LIBRARY.impl("batch_norm", lambda x, *rest: torch.empty_like(x), "Meta")

#: Batch norm in evaluation mode, as one operation; `fxshap.ops.frozen` runs it.
BATCH_NORM = torch.ops.fxshap.batch_norm.default
