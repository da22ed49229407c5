"""A block of a network, the layouts it runs in, and the table of all blocks.

A block is built once for a network, from options, and called with one or more tensors of shape
(rows, 12). Elementwise blocks run in any layout, those along the last dimension in most, the others
on the flat tensor only. Their results are flattened to (rows, anything).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: The number of features of every value between blocks.
WIDTH = 12


@dataclass(frozen=True)
class Block:
    """One operation, layer or way of writing a computation.

    Attributes
    ----------
    make : callable
        ``make(**options)`` returns a function or a module of `arity` tensors.
    arity : int
        The number of tensors it takes.
    layouts : tuple of str
        The layouts it can run in.
    options : dict of str to tuple
        The possible values of each option.
    fixes_rows : bool
        Whether it loops over the rows, so that a capture holds for one number of rows.
    """

    make: Callable[..., Callable[..., Tensor]]
    arity: int = 1
    layouts: tuple[str, ...] = ("flat",)
    options: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    fixes_rows: bool = False


BLOCKS: dict[str, Block] = {}


def add(name: str, block: Block) -> None:
    assert name not in BLOCKS, name
    BLOCKS[name] = block


# --- layouts --------------------------------------------------------------------------------------


def reshape_rows(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda h: h.reshape(-1, *shape)


def flat(y: Tensor) -> Tensor:
    return y.reshape(-1, WIDTH)


#: Functions to and from each layout; `time_folded` is (T, B, C) reshaped to (T * B, C).
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "flat": (lambda h: h, lambda y: y),
    "tokens": (reshape_rows(3, 4), flat),
    "pairs": (reshape_rows(6, 2), flat),
    "image": (reshape_rows(3, 2, 2), flat),
    "channels_last": (
        lambda h: h.reshape(-1, 3, 2, 2).contiguous(memory_format=torch.channels_last), flat
    ),
    "time_first": (
        lambda h: h.reshape(-1, 3, 4).transpose(0, 1), lambda y: flat(y.transpose(0, 1))
    ),
    "time_folded": (
        lambda h: h.reshape(-1, 3, 4).transpose(0, 1).reshape(-1, 4),
        lambda y: flat(y.reshape(3, -1, 4).transpose(0, 1)),
    ),
    "rows_folded": (lambda h: h.reshape(-1, 4), flat),
    "strided": (
        lambda h: h.reshape(-1, 4, 3).transpose(1, 2), lambda y: flat(y.transpose(1, 2))
    ),
    "single": (reshape_rows(WIDTH, 1), flat),
    "rows_last": (lambda h: h.T, lambda y: y.T),
    "one_dimension": (lambda h: h.flatten(), flat),
}  # fmt: skip

ANY_LAYOUT = tuple(LAYOUTS)
ALONG_LAST = tuple(name for name in LAYOUTS if name not in ("rows_last", "one_dimension"))


def bind_options(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return partial(function, **options)


def elementwise(name: str, function: Callable[..., Tensor], arity: int = 1, **options: Any) -> None:
    """Declare an elementwise function."""
    add(name, Block(partial(bind_options, function), arity, ANY_LAYOUT, options))


def along_last(name: str, function: Callable[..., Tensor], arity: int = 1, **options: Any) -> None:
    """Declare a function along the last dimension of (..., features), of any size."""
    add(name, Block(partial(bind_options, function), arity, ALONG_LAST, options))


def rowwise(name: str, function: Callable[..., Tensor], arity: int = 1, **options: Any) -> None:
    """Declare a function of (rows, 12)."""
    add(name, Block(partial(bind_options, function), arity, options=options))


def module(name: str, arity: int = 1, **options: Any) -> Callable[[Any], Any]:
    """Declare the decorated maker of a function or module of (rows, 12)."""

    def declare(make: Any) -> Any:
        add(name, Block(make, arity, options=options))
        return make

    return declare


class Chain(nn.Module):
    """Modules and functions, one after another."""

    def __init__(self, *parts: Callable[..., Tensor]) -> None:
        super().__init__()
        self.modules_among = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.parts = parts

    def forward(self, *values: Tensor) -> Tensor:
        first, *rest = self.parts
        y = first(*values)
        for part in rest:
            y = part(y)
        return y


class ModuleFunction(nn.Module):
    """A function that uses a module, with its parameters."""

    def __init__(self, held: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.held, self.function = held, function

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)
