"""Recording of recurrent layers, and of packed sequences as padded ones.

A packed sequence has the steps of all rows in one dimension, in an order that depends on their
lengths. Here its ``data`` has shape (rows * steps, ...): every row with the steps of the longest.
The padding of a row repeats its first step, so that no operation on ``data`` meets values that the
model never sees, and recurrent layers take the lengths.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from fxshap.ops.recurrent import KERNELS, OPERATORS

#: The operators that take the place of torch's functions.
RECORDED: dict[Callable[..., Any], Callable[..., tuple[Tensor, ...]]] = {
    kernel: OPERATORS[name] for name, kernel in KERNELS.items()
}

#: How many frames of other modes may lie between a function of torch and this one.
MAX_MODES = 8


@dataclass(frozen=True)
class Padded:
    """What stands for the batch sizes of a packed sequence.

    Attributes
    ----------
    batch_sizes : Tensor
        The tensor of the packed sequence, of shape (steps,).
    lengths : Tensor
        The number of steps of every row.
    """

    batch_sizes: Tensor
    lengths: Tensor

    @property
    def rows(self) -> int | torch.SymInt:
        """The number of rows."""
        return self.lengths.shape[0]

    @property
    def steps(self) -> int:
        """The number of steps of the longest row."""
        return len(self.batch_sizes)

    def before_padding(self) -> Tensor:
        """Return which steps are no padding, of shape (rows, steps)."""
        return torch.arange(self.steps) < self.lengths.unsqueeze(1)

    def rows_of(self, data: Tensor) -> Tensor:
        """Return the data of a packed sequence with dimensions (rows, steps, ...)."""
        return data.reshape(self.rows, self.steps, *data.shape[1:])


class RecordRecurrent(TorchFunctionMode):
    """Record every recurrent layer as one operation, and packed sequences as padded ones."""

    def __init__(self) -> None:
        super().__init__()
        self._padded: dict[int, Padded] = {}  # by the identity of the batch sizes

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.sort and is_called_by(pack_padded_sequence):
            return args[0], torch.arange(args[0].shape[0], device=args[0].device)
        if func is torch._pack_padded_sequence:
            return self.pack(*args, **kwargs)
        if func is torch._pad_packed_sequence and (padded := self.find(args[1])):
            return self.pad(padded, args[0], *args[2:], **kwargs)
        if func is Tensor.__getitem__ and (padded := self.find(args[0])) and is_zero(args[1]):
            return padded.rows  # a layer asks for the number of rows
        # Autocast casts what torch's own function receives.
        if func in RECORDED and not torch.is_autocast_enabled(args[0].device.type):
            return self.run_layers(func, *args, **kwargs)
        return func(*args, **kwargs)

    def find(self, batch_sizes: Any) -> Padded | None:
        """Return what stands for the batch sizes of a packed sequence."""
        return self._padded.get(id(batch_sizes))

    def pack(self, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """Return the data and the batch sizes of a packed sequence, as ``torch`` does."""
        rows = input if batch_first else input.transpose(0, 1)
        steps = int(lengths.max())
        rows = rows[:, :steps]
        padded = Padded(torch.zeros(steps, dtype=torch.int64), lengths)
        self._padded[id(padded.batch_sizes)] = padded
        valid = padded.before_padding().to(rows.device)
        valid = valid.reshape(*valid.shape, *[1] * (rows.dim() - 2))
        return rows.where(valid, rows[:, :1]).flatten(0, 1), padded.batch_sizes

    def pad(
        self, padded: Padded, data: Tensor, batch_first: bool, padding_value: float, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return a padded sequence of `length` steps, and the lengths of its rows."""
        rows = padded.rows_of(data)
        valid = padded.before_padding().to(rows.device)
        rows = rows.where(valid.reshape(*valid.shape, *[1] * (rows.dim() - 2)), padding_value)
        missing = [0, 0] * (rows.dim() - 2) + [0, length - padded.steps]
        rows = F.pad(rows, missing, value=padding_value)
        return rows if batch_first else rows.transpose(0, 1), padded.lengths

    def run_layers(self, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run recurrent layers on a sequence, or on the data of a packed sequence."""
        operator = RECORDED[func]
        padded = self.find(args[0])
        if padded is None:
            return operator(input, *args, **kwargs)
        batch_first = True
        lengths = padded.lengths.to(input.device)
        outputs, *states = operator(
            padded.rows_of(input), *args[1:], batch_first, lengths, **kwargs
        )
        return outputs.flatten(0, 1), *states


def is_called_by(function: Callable[..., Any]) -> bool:
    """Return True if a function of torch has called what calls this."""
    frame = sys._getframe(2)
    for _ in range(MAX_MODES):
        if frame.f_code is function.__code__:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def is_zero(index: Any) -> bool:
    """Return True if an index is the number 0."""
    return isinstance(index, int) and index == 0


@contextmanager
def without_packed_checks(model: nn.Module) -> Iterator[None]:
    """Have recurrent layers not check the rows of a packed sequence, which would fix their number.

    They take it out of a tensor as a Python number.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    for layer in layers:
        layer.__dict__["check_forward_args"] = partial(check_unless_packed, type(layer), layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["check_forward_args"]


def check_unless_packed(
    kind: type[nn.RNNBase],
    layer: nn.RNNBase,
    input: Tensor,
    hidden: Any,
    batch_sizes: Tensor | None,
) -> None:
    """Check the arguments of a recurrent layer as its class does, but not of packed sequences."""
    if batch_sizes is None:
        kind.check_forward_args(layer, input, hidden, batch_sizes)
