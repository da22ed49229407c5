"""The real values of the fake tensors of a trace, computed when a value is needed.

``torch.export`` runs the model on fake tensors, which have a shape and no values. Every operation
on them is recorded here, and run again on real tensors as soon as Python needs the value of one.
What does not depend on the explained inputs is run without what does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import is_fake
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from fxshap.graph.dataflow import SHAPE_ONLY
from fxshap.graph.symbols import free_symbols, free_unbacked_symbols

#: The types of numbers that a trace does not know.
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Operation:
    """One operation of a trace.

    Attributes
    ----------
    function : callable
    args, kwargs : tuple, dict
        With fake tensors.
    output : object
        Fake tensors.
    varying : bool
        Whether it depends on the values of the explained inputs.
    shape_only : bool
        Whether it reads only the shapes of its arguments.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    varying: bool
    shape_only: bool


class RealValues:
    """The real values of fake tensors.

    Parameters
    ----------
    pairs : iterable of (Tensor, Tensor)
        Fake tensors that the trace begins with, and their real values, which are not changed.
    varying : sequence of Tensor
        Those of the fake tensors that are explained.
    """

    def __init__(
        self, pairs: Iterable[tuple[Tensor, Tensor]], varying: Sequence[Tensor] = ()
    ) -> None:
        self._real = WeakTensorKeyDictionary()
        self._given = WeakTensorKeyDictionary()  # copied when they are used: they may be changed
        self._memory = WeakTensorKeyDictionary()  # views of one tensor have equal numbers
        self._allocated = 0
        self._parameters: set[int] = set()  # their memory, which no operation may change
        self._symbols: dict[Any, int | float] = {}
        self._varying_symbols: set[Any] = set()
        self._pending: deque[Operation] = deque()
        self._changes = 0  # how many pending operations change what does not vary
        for fake, real in pairs:
            self._set(fake, real)
            if isinstance(real, nn.Parameter):
                self._parameters.add(real.untyped_storage().data_ptr())
            else:
                self._given[fake] = real
        self._varying_memory = {self._memory_of(fake) for fake in varying}

    def is_varying(self, value: Any) -> bool:
        """Return True if a fake tensor or a number depends on the explained inputs' values."""
        if isinstance(value, SYMBOLIC):
            return not self._varying_symbols.isdisjoint(unknown_symbols(value))
        return isinstance(value, Tensor) and self._memory_of(value) in self._varying_memory

    def record(self, function: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Record an operation of the trace, which has run on fake tensors."""
        leaves = pytree.tree_leaves((args, kwargs))
        shape_only = getattr(function, "overloadpacket", function) in SHAPE_ONLY
        varying = not shape_only and any(map(self.is_varying, leaves))
        changed = changed_arguments(function, args, kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if returns_views(function):
            source = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
            for view in outputs:
                self._memory[view] = self._memory_of(source)
        if varying:
            self._varying_memory.update(map(self._memory_of, [*outputs, *changed]))
            self._varying_symbols |= unknown_symbols(output)
        if changed and not varying:
            self._changes += 1
        self._pending.append(Operation(function, args, kwargs, output, varying, shape_only))

    def compute(self, function: Any, args: Any, kwargs: Any, *, by_shape: bool = False) -> Any:
        """Return the result of a function for the real values of fake tensors and numbers.

        Parameters
        ----------
        function : callable
        args, kwargs : tuple, dict
        by_shape : bool
            Whether only the shapes matter of tensors that depend on the explained inputs.
        """
        # What is changed in place must not change before what reads the old value.
        leaves = [] if by_shape else pytree.tree_leaves((args, kwargs))
        varying = self._changes > 0 or any(map(self.is_varying, leaves))
        self._changes = 0
        with real_execution():
            for _ in range(len(self._pending)):
                operation = self._pending.popleft()
                if operation.varying and not varying:
                    self._pending.append(operation)
                else:
                    self._run(operation)
            args, kwargs = self._find((args, kwargs), by_shape)
            return function(*args, **kwargs)

    def _run(self, operation: Operation) -> None:
        arguments = operation.args, dict(operation.kwargs)
        args, kwargs = self._find(arguments, operation.shape_only)
        for tensor in changed_arguments(operation.function, args, kwargs):
            if tensor.untyped_storage().data_ptr() in self._parameters:
                raise RuntimeError("data-dependent: the model changes one of its parameters")
        output = operation.function(*args, **kwargs)
        leaves = zip(pytree.tree_leaves(operation.output), pytree.tree_leaves(output), strict=True)
        for fake, real in leaves:
            if isinstance(fake, Tensor):
                self._set(fake, real)
            elif isinstance(fake, SYMBOLIC):
                self._bind(fake, real)

    def _find(self, values: Any, shape_only: bool = False) -> Any:
        def find(leaf: Any) -> Any:
            if isinstance(leaf, SYMBOLIC):
                return self._number(leaf)
            if leaf in self._given:
                self._real[leaf] = self._given.pop(leaf).detach().clone()
            if leaf not in self._real and not is_fake(leaf):  # a constant of the trace
                self._set(leaf, leaf.detach().clone())
            if leaf not in self._real and shape_only:
                shape = [self._number(size) for size in leaf.shape]
                return torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)
            return self._real[leaf]

        return pytree.tree_map_only((Tensor, *SYMBOLIC), find, values)

    def _set(self, fake: Tensor, real: Tensor) -> None:
        self._real[fake] = real
        for size, number in zip(fake.shape, real.shape, strict=True):
            self._bind(size, number)

    def _bind(self, symbolic: Any, number: int | float) -> None:
        """Remember the number that a symbol stands for."""
        if isinstance(symbolic, SYMBOLIC) and symbolic.node.expr.is_Symbol:
            self._symbols[symbolic.node.expr] = number

    def _number(self, value: Any) -> Any:
        """Return the number that a symbolic expression stands for."""
        if not isinstance(value, SYMBOLIC):
            return value
        number = value.node.expr.xreplace(self._symbols)
        if free_symbols(number):
            return value.node.hint
        kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
        return kind(number)

    def _memory_of(self, tensor: Tensor) -> int:
        if tensor not in self._memory:
            self._allocated += 1
            self._memory[tensor] = self._allocated
        number: int = self._memory[tensor]
        return number


def unknown_symbols(values: Any) -> set[Any]:
    """Return the symbols in nested values that stand for numbers which depend on tensors."""
    leaves = [x for x in pytree.tree_leaves(values) if isinstance(x, (Tensor, *SYMBOLIC))]
    return set(free_unbacked_symbols(leaves))


@contextmanager
def real_execution() -> Iterator[None]:
    """Run operations on real tensors, and record none of them."""
    with (
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        yield


def changed_arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the tensors that an operator changes in place."""
    names = written_arguments(function) if isinstance(function, OpOverload) else ()
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in names]
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


@cache
def written_arguments(function: OpOverload) -> tuple[tuple[int, str], ...]:
    """Return the positions and names of the arguments that an operator changes in place."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def returns_views(function: Any) -> bool:
    """Return True if an operator returns views of its first tensor, and does not change it."""
    if not isinstance(function, OpOverload) or written_arguments(function):
        return False
    return any(value.alias_info is not None for value in function._schema.returns)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by their names; tied ones have several."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
