"""Recording of recurrent layers, and of packed sequences as padded ones.

A packed sequence has the steps of all rows in one dimension, in an order that depends on their
lengths. Here its ``data`` has shape (rows * steps, ...): every row with all its steps, padding
included, up to those of the longest row. Operations on ``data`` treat every element of this
dimension alike, so padding changes nothing in them, and recurrent layers take the lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxshap.ops.recurrent import KERNELS, OPERATORS

#: The operators that take the place of torch's functions.
RECORDED: dict[Callable[..., Any], Callable[..., Any]] = {
    kernel: OPERATORS[name] for name, kernel in KERNELS.items()
}


class RecordRecurrent(TorchFunctionMode):
    """Record every recurrent layer as one operation, whose shapes need no run over the steps."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operator = RECORDED.get(func)
        # Autocast casts what torch's own function receives.
        if operator is None or torch.is_autocast_enabled(args[0].device.type):
            return func(*args, **(kwargs or {}))
        return operator(*args, **(kwargs or {}))
