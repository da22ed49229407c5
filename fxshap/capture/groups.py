"""Python that asks which groups rows are routed to, and how many rows are in each.

A model may call every expert only if it has tokens, and split its tokens by their number:

    for expert in (counts > 0).nonzero():         if not mask.any(): continue
    sizes = counts.tolist()                       if len(tokens) == 0: continue

All of these only save time: a group without rows adds nothing. Here every group is taken to have
rows, so that the graph is that of all groups. Whether the model really computes the same is checked
when it explains, by values (:func:`fxshap.runtime.batching.check_assumed`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxshap.graph.nodes import CASTS, call_args, op_packet
from fxshap.graph.symbols import free_unbacked_symbols

aten = torch.ops.aten

#: Operations on the shape of a tensor, which select elements at constant positions, or copy it.
RESHAPES = (
    *CASTS, aten.view, aten.reshape, aten.flatten, aten.squeeze, aten.unsqueeze, aten.permute,
    aten.transpose, aten.t, aten.select, aten.slice, aten.unbind, aten.clone, aten.detach,
    aten.detach_, aten.alias, aten.contiguous, aten.numpy_T, operator.getitem,
)  # fmt: skip
#: Operations that return 0 or 1, or True or False.
COMPARISONS = (
    aten.eq, aten.ne, aten.gt, aten.ge, aten.lt, aten.le, aten.logical_and, aten.bitwise_and,
    aten.__and__, aten.logical_or, aten.bitwise_or, aten.__or__, aten.logical_not, aten.one_hot,
    aten.isin, aten.mul,
)  # fmt: skip
#: Set elements of a tensor; of zeros, if the value that they set is 1.
SETTERS = (aten.scatter, aten.scatter_)
TOTALS = (aten.sum, aten.count_nonzero, aten.histc, aten.bincount)
#: A mask of these belongs to a check of the input, and not to a group.
CHECKS = (aten.isnan, aten.isinf, aten.isfinite, aten.isreal)

#: Functions whose result has one row for every True element of a mask.
SELECTIONS = (
    torch.where, torch.nonzero, torch.argwhere, torch.masked_select, Tensor.where, Tensor.nonzero,
    Tensor.argwhere, Tensor.masked_select, Tensor.__getitem__,
)  # fmt: skip

#: Where the node of a running total keeps it as a number.
TOTAL = "running_total"

#: The number of rows that a group is said to have, where Python needs a number that is known.
SOME = 2


@dataclass
class GroupChoice:
    """Whether a capture enumerates groups. Export restores attributes of a module, but not these.

    Attributes
    ----------
    enumerates : bool
        Whether to take every group that rows are routed to as one with rows.
    assumed : bool
        Whether any group was.
    counted : bool
        Whether Python has read how many rows a group has, as a number.
    """

    enumerates: bool = False
    assumed: bool = False
    counted: bool = False


class EnumerateGroups(TorchFunctionMode):
    """Takes every group that rows are routed to as one with rows.

    Parameters
    ----------
    inputs : sequence of Tensor
        The explained inputs. Python may read all that does not depend on them.
    choice : GroupChoice
        Whether a group was taken so is written there.
    """

    def __init__(self, inputs: Sequence[Tensor], choice: GroupChoice) -> None:
        super().__init__()
        self.choice = choice
        self.inputs = {node_of(x) for x in inputs} - {None}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = ANSWERS.get(func)
        if answer is not None and (node := self.varying_node(args[0])) is not None:
            answered = answer(args[0], node, *args[1:], **kwargs)
            if answered is not None:
                self.choice.assumed = True
                self.choice.counted |= func is Tensor.__int__
                return answered
        output = func(*args, **kwargs)
        if func in SELECTIONS:
            self.assume_rows(output)
        return output

    def varying_node(self, tensor: Any) -> fx.Node | None:
        """Return the node of a tensor that depends on the explained inputs."""
        node = node_of(tensor) if isinstance(tensor, Tensor) else None
        return node if node is not None and self.inputs & set(ancestors(node)) else None

    def assume_rows(self, output: Any) -> None:
        """Take what is selected by a mask that depends on the inputs to have rows."""
        for tensor in pytree.tree_leaves(output):
            if not isinstance(tensor, Tensor) or not tensor.dim():
                continue
            if free_unbacked_symbols(tensor.shape[0]) and self.varying_node(tensor) is not None:
                assume_positive(tensor.shape[0])
                self.choice.assumed = True


# --- what is asked --------------------------------------------------------------------------------


def static_counts(
    numbers: Tensor, node: fx.Node, weights: Tensor | None = None, minlength: int = 0
) -> Tensor | None:
    """``bincount``, of a size that does not depend on values."""
    size = max(minlength, candidates(node) or 0)
    if not size:
        return None
    equal = numbers.reshape(-1, 1) == torch.arange(size, device=numbers.device)
    return equal.sum(0) if weights is None else (equal * weights.reshape(-1, 1)).sum(0)


def all_numbers(numbers: Tensor, node: fx.Node, *options: Any, **named: Any) -> Any:
    """``unique``: a list of all groups, as if it were of those that have rows, and their counts."""
    with_counts = named.pop("return_counts", False)
    if any(options) or any({**named, "sorted": False}.values()):
        return None
    counts = static_counts(numbers, node)
    if counts is None:
        return None
    occupied_groups = counts.nonzero().squeeze(1)
    return (occupied_groups, counts) if with_counts else occupied_groups


def each_number(numbers: Tensor, node: fx.Node, dim: int = 0) -> tuple[Tensor, ...] | None:
    """Iterate over the groups that have rows: over all. ``tolist`` does that too."""
    if dim == 0 and is_running(node) and numbers.dim() == 1:
        with torch._C.DisableTorchFunction():
            parts: tuple[Tensor, ...] = numbers.unbind(0)
        for part, number in zip(parts, sizes_of(numbers, node), strict=True):
            part_node = node_of(part)
            assert part_node is not None
            part_node.meta[TOTAL] = number
        return parts
    size = enumerated(node)
    if size is None or dim != 0:
        return None
    shape = [1] * (numbers.dim() - 1)
    return tuple(torch.tensor(k, device=numbers.device).reshape(shape) for k in range(size))


def as_list(tensor: Tensor, node: fx.Node) -> list[Any] | None:
    """Return the numbers of all groups, or how many rows each has."""
    size = enumerated(node)
    if size is not None:
        return [[k] if tensor.dim() == 2 else k for k in range(size)]
    if tensor.dim() != 1 or not isinstance(tensor.shape[0], int) or not is_count(node):
        return None
    return sizes_of(tensor, node)


def as_array(tensor: Tensor, node: fx.Node, *options: Any, **named: Any) -> Any:
    """``numpy``: an array of the numbers of all groups, or of how many rows each has."""
    numbers = as_list(tensor, node)
    return None if numbers is None else np.array(numbers, dtype=object)


def sizes_of(counts: Tensor, node: fx.Node) -> list[Any]:
    """Return how many rows every group has, as numbers unknown to torch.

    Running totals are sums of such numbers, so that torch can tell which is larger.
    """
    running = is_running(node)
    sizes = counts.diff(prepend=counts.new_zeros(1)) if running else counts
    with torch._C.DisableTorchFunction():
        numbers: list[Any] = sizes.tolist()
    for number in numbers:
        assume_positive(number)
    return list(accumulate(numbers)) if running else numbers


def assume_positive(number: Any) -> None:
    """Tell torch that a number is positive, in the forms in which Python may ask."""
    for known in (number >= 1, number > 0, number != 0):
        torch._check(known)


def one_size(count: Tensor, node: fx.Node) -> Any:
    """``item``: how many rows a group has; or whether it has any."""
    if TOTAL in node.meta:
        return node.meta[TOTAL]
    truth = occupied(node)
    if truth is not None and count.dtype is torch.bool:
        return truth
    if count.dtype.is_floating_point or not is_count(node):
        return None
    with torch._C.DisableTorchFunction():
        number = count.item()
    assume_positive(number)
    return number


def some_count(count: Tensor, node: fx.Node) -> int | None:
    """``int``, which must be a number: how many rows a group has is often compared only with 0."""
    return SOME if is_count(node) else None


def occupied_or_none(tensor: Tensor, node: fx.Node) -> bool | None:
    """``bool``: whether a group has rows."""
    return occupied(node)


def some_rows(tensor: Tensor, node: fx.Node) -> int | None:
    """``len``, which must be a number: of what a mask selects, it is rarely compared but with 0."""
    return SOME if free_unbacked_symbols(tensor.shape[0]) else None


#: For each function, what answers it. An answer of ``None`` leaves it to torch.
ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.bincount: static_counts,
    Tensor.bincount: static_counts,
    torch.unique: all_numbers,
    Tensor.unique: all_numbers,
    Tensor.unbind: each_number,
    torch.unbind: each_number,
    Tensor.numpy: as_array,
    Tensor.item: one_size,
    Tensor.__bool__: occupied_or_none,
    Tensor.__len__: some_rows,
    Tensor.__int__: some_count,
}


# --- where a tensor comes from --------------------------------------------------------------------


def node_of(tensor: Tensor) -> fx.Node | None:
    """Return the node of the trace that computes a tensor."""
    mode = get_proxy_mode()
    if mode is None:
        return None
    slot = get_proxy_slot(tensor, mode.tracer, None)
    node: fx.Node | None = getattr(getattr(slot, "proxy", slot), "node", None)
    return node


def ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """Iterate over a node and all that it depends on."""
    seen, remaining = {node}, [node]
    while remaining:
        node = remaining.pop()
        yield node
        remaining += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)


def first_input(node: fx.Node) -> fx.Node:
    """Return the first argument of a node."""
    return node.all_input_nodes[0]


def without_reshapes(node: fx.Node) -> fx.Node:
    """Return the node whose elements a chain of copies and views selects."""
    while op_packet(node) in RESHAPES and node.all_input_nodes:
        node = first_input(node)
    return node


def is_indicator(node: fx.Node) -> bool:
    """Return True if a node is 0 or 1, or True or False, for whether a row is in a group."""
    node = without_reshapes(node)
    packet = op_packet(node)
    if packet in CHECKS:
        return False
    if packet in SETTERS:
        return bool(call_args(node)[3] == 1)
    if packet in COMPARISONS:
        return not any(op_packet(source) in CHECKS for source in node.all_input_nodes)
    return False


def is_count(node: fx.Node) -> bool:
    """Return True if a node counts the rows of groups."""
    node = without_reshapes(node)
    packet = op_packet(node)
    if packet in (aten.histc, aten.bincount):
        return True
    if packet in TOTALS:
        return is_indicator(first_input(node)) or is_count(first_input(node))
    return packet is aten.cumsum and is_count(first_input(node))


def is_running(node: fx.Node) -> bool:
    """Return True if a node is the running totals of counts, or some of them."""
    return op_packet(without_reshapes(node)) is aten.cumsum and is_count(node)


#: Operations that return indices, and the position of the dimension among their arguments.
CHOICES = {
    aten.topk: 2, aten.sort: 1, aten.argsort: 1, aten.max: 1, aten.min: 1, aten.argmax: 1,
    aten.argmin: 1,
}  # fmt: skip


def candidates(node: fx.Node) -> int | None:
    """Return among how many groups indices were chosen, if it is known."""
    source = without_reshapes(node)
    if op_packet(source) not in CHOICES:
        return None
    position = CHOICES[op_packet(source)]
    scores, *rest = call_args(source)
    dim = rest[position - 1] if len(rest) >= position else -1
    size = scores.meta["val"].shape[dim]
    return size if isinstance(size, int) else None


def enumerated(node: fx.Node) -> int | None:
    """Return how many groups there are for a list of those that have rows."""
    source = without_reshapes(node)
    if op_packet(source) not in (aten.nonzero, aten.where, aten.nonzero_numpy):
        return None
    mask = first_input(source)
    shape = mask.meta["val"].shape
    if len(shape) != 1 or not isinstance(shape[0], int) or len(source.all_input_nodes) != 1:
        return None
    return shape[0] if occupied(mask) else None


def occupied(node: fx.Node) -> bool | None:
    """Return what a question for whether groups have rows is answered if all have."""
    node = without_reshapes(node)
    packet, arguments = op_packet(node), call_args(node)
    if packet is aten.any:
        return True if is_indicator(first_input(node)) else occupied(first_input(node))
    if packet is aten.logical_not:
        answer = occupied(first_input(node))
        return None if answer is None else not answer
    if is_count(node):
        return True
    if len(arguments) == 2 and is_count(first_input(node)):
        return THRESHOLDS.get((packet, arguments[1]))
    return None


#: Comparisons of a count that only ask whether it is 0, and their answer if it is not.
THRESHOLDS: dict[Any, bool] = {
    (aten.gt, 0): True, (aten.greater, 0): True, (aten.ne, 0): True, (aten.ge, 1): True,
    (aten.eq, 0): False, (aten.lt, 1): False, (aten.le, 0): False,
}  # fmt: skip
