"""What all cases share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxshap.testing.rule_check import Varying

inf = math.inf


def v(*shape: int, low: float = -inf, high: float = inf, row: int | None = 0) -> Varying:
    return Varying(shape, low, high, row)


def constant(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


#: Ranges of factors that do not overflow, and of divisors.
NEAR = {"low": -4.0, "high": 4.0}
AWAY = {"low": 0.5, "high": 8.0}
