"""An operation with its constant arguments bound, as rules receive it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.ops.dtypes import accumulating, differentiable
from fxshap.ops.schemas import named_arguments

Output = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Operation:
    """A function of its *varying* arguments: those that depend on the model's input.

    Attributes
    ----------
    target : callable
        The ATen operator, for example ``torch.ops.aten.softmax.int``.
    arguments : tuple
        Positional arguments, flattened, with ``None`` where a varying tensor goes.
    structure : TreeSpec
        How to unflatten `arguments` into ``(args, kwargs)``.
    slots : tuple of int
        Indices of the varying tensors in `arguments`.
    name : str
        The node's name in the graph, for messages.
    rows : tuple of int or None
        The batch dimension of every varying tensor and, after them, of every output. ``None`` means
        that a tensor has no batch dimension: all of it is one row.
    """

    target: Callable[..., Any]
    arguments: tuple[Any, ...]
    structure: pytree.TreeSpec
    slots: tuple[int, ...]
    name: str = ""
    rows: tuple[int | None, ...] = field(default=())

    @classmethod
    def bind(
        cls,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        slots: Sequence[int] = (0,),
        name: str = "",
        rows: Sequence[int | None] = (),
    ) -> tuple[Operation, tuple[Tensor, ...]]:
        """Split a call into the operation and the values of its varying tensors.

        `args` and `kwargs` are the arguments of the call; `slots` are the indices of the varying
        tensors among them, flattened.
        """
        flat, structure = pytree.tree_flatten((tuple(args), kwargs or {}))
        varying = tuple(flat[slot] for slot in slots)
        for slot in slots:
            flat[slot] = None
        rows = tuple(rows) or (0,) * (len(slots) + 1)
        return cls(target, tuple(flat), structure, tuple(slots), name, rows), varying

    def __call__(self, *varying: Tensor) -> Output:
        """Run the operation at these values of its varying arguments."""
        flat = list(self.arguments)
        for slot, value in zip(self.slots, varying, strict=True):
            flat[slot] = value
        args, kwargs = pytree.tree_unflatten(flat, self.structure)
        output: Output = self.target(*args, **kwargs)
        return tuple(output) if isinstance(output, list) else output

    def __getitem__(self, name: str) -> Any:
        """Return the constant argument `name` of the operator's schema, or its default."""
        return self.named[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return the constant argument `name`, or `default` if the operator has none."""
        return self.named.get(name, default)

    @cached_property
    def named(self) -> dict[str, Any]:
        """The arguments by their names in the operator's schema; ``None`` for those that vary."""
        args, kwargs = pytree.tree_unflatten(list(self.arguments), self.structure)
        return named_arguments(self.target, args, kwargs)

    @cached_property
    def accumulating(self) -> Operation:
        """The same operation in the type in which rules compute."""
        return replace(self, arguments=tuple(map(accumulating, self.arguments)))


def vjp(operation: Operation, point: Sequence[Tensor], grad: Any) -> tuple[Tensor | None, ...]:
    """Return the vector-Jacobian product of `operation` at `point`, by autograd.

    Parameters
    ----------
    operation : Operation
    point : sequence of Tensor
        Values of the varying arguments; those that are not floating point get ``None``.
    grad : Tensor or tuple of (Tensor or None)
        Cotangent of the output, or those of several outputs.

    Returns
    -------
    tuple of (Tensor or None)
        One cotangent for every varying argument.

    Examples
    --------
    The derivative of the square at 3 is 6.

    >>> import torch, fxshap
    >>> square = torch.ops.aten.square.default
    >>> operation, _ = fxshap.rules.Operation.bind(square, [torch.zeros(1)])
    >>> fxshap.rules.vjp(operation, [torch.tensor([3.0])], torch.ones(1))
    (tensor([6.]),)
    """
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_(differentiable(value)) for value in point]
        output = operation(*leaves)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    grads = [grad] if isinstance(output, Tensor) else list(grad)
    pairs = [
        (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
    ]
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not inputs:
        return tuple(torch.zeros_like(leaf) if leaf.requires_grad else None for leaf in leaves)
    grads_of_inputs = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], inputs, [g for _, g in pairs], materialize_grads=True
        )
    )
    return tuple(next(grads_of_inputs) if leaf.requires_grad else None for leaf in leaves)
