"""Recurrent layers: stacks of layers and directions of the cells of :mod:`.recurrent_cells`.

The rows may have different numbers of steps. Every direction reads the steps of a row first, and
the padding after them, so that padding changes nothing before it. Its multipliers are 0, and the
cotangents of the final states enter at the last step of each row.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.ops.recurrent import KERNELS, OPERATORS, recurrent
from fxshap.rules.core.caching import before_repetition, cached, cached_between
from fxshap.rules.core.dispatch import for_each_cotangent
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Target, Tensors, rule
from fxshap.rules.recurrent_cells import (
    GRU,
    LSTM,
    RNN_RELU,
    RNN_TANH,
    Cell,
    State,
    StepValues,
    Sums,
    Weights,
    states_before,
)

aten = torch.ops.aten


class Stack(NamedTuple):
    """The layers of a recurrent operation.

    Attributes
    ----------
    cell : Cell
    weights : list of Weights
        One for each layer and direction, the directions of a layer together.
    reverse : tuple of bool
        For each direction, whether it reads the sequence from its end.
    lengths : Tensor, optional
        The number of steps of every row; by default all.
    smoothed : bool
        Whether the gates receive the variances of the sums before them.
    """

    cell: Cell
    weights: list[Weights]
    reverse: tuple[bool, ...]
    lengths: Tensor | None = None
    smoothed: bool = False

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.weights) // len(self.reverse)

    def in_reading_order(self, steps: Tensor, reverse: bool) -> Tensor:
        """Reverse the steps of every row, but not its padding, if `reverse` is set.

        Parameters
        ----------
        steps : Tensor
            Shape (steps, ..., rows, features).
        reverse : bool
        """
        if not reverse:
            return steps
        if self.lengths is None:
            return steps.flip(0)
        step = torch.arange(len(steps), device=steps.device).unsqueeze(1)
        index = torch.where(step < self.lengths, self.lengths - 1 - step, step)
        shape = (len(steps), *[1] * (steps.dim() - 3), -1, 1)
        return steps.gather(0, index.reshape(shape).expand_as(steps))

    def with_every(self, count: int) -> Stack:
        """Return the same layers for the first of every `count` rows."""
        return self if self.lengths is None else self._replace(lengths=self.lengths[::count])

    def before_padding(self, steps: int) -> Tensor | None:
        """Return which steps of which rows are no padding, of shape (steps, rows)."""
        if self.lengths is None:
            return None
        return torch.arange(steps, device=self.lengths.device).unsqueeze(1) < self.lengths


class StackOutput(NamedTuple):
    """The result of :func:`stack_forward`.

    Attributes
    ----------
    activations : list of dict
        Those of every layer and direction.
    outputs : Tensor
        Of the last layer, with the time in the first dimension.
    states : tuple of Tensor
        Final states, with the layers and directions in the first dimension.
    """

    activations: list[StepValues]
    outputs: Tensor
    states: State


def stack_forward(stack: Stack, sequence: Tensor, state: State) -> StackOutput:
    """Run all layers and directions."""
    activations: list[StepValues] = []
    finals: list[State] = []
    for layer in range(stack.num_layers):
        outputs = []
        for direction, reverse in enumerate(stack.reverse):
            index = layer * len(stack.reverse) + direction
            initial = tuple(s[index] for s in state)
            steps = stack.in_reading_order(sequence, reverse)
            out, final, values = stack.cell.forward(steps, initial, stack.weights[index])
            if stack.smoothed:
                # A copy: values that are cached for a tensor must not be views of it.
                values |= {"inputs": steps.clone(), "states": states_before(initial[0], out)}
            outputs.append(stack.in_reading_order(out, reverse))
            activations.append(values)
            finals.append(final)
        sequence = torch.cat(outputs, -1)
    states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    return StackOutput(activations, sequence, states)


#: Elements of the largest activation in one block of steps, so that its parts stay in the caches of
#: a processor.
BLOCK_ELEMENTS = 2**16


def stack_multipliers(
    stack: Stack, reference: list[StepValues], sample: list[StepValues]
) -> list[StepValues]:
    """Return the multipliers of every layer and direction, those of padding 0.

    Parameters
    ----------
    stack : Stack
    reference, sample : list of dict
        The activations of every layer and direction.
    """
    layers = zip(reference, sample, stack.weights, strict=True)
    multipliers = [layer_multipliers(stack, *layer) for layer in layers]
    if stack.lengths is None:
        return multipliers
    return [
        {
            name: where_steps(stack, value, 1.0 if name == stack.cell.carry else 0.0)
            for name, value in values.items()
        }
        for values in multipliers
    ]


def layer_multipliers(
    stack: Stack, reference: StepValues, sample: StepValues, weights: Weights
) -> StepValues:
    """Return the multipliers of one layer in one direction, block of steps by block.

    The sample has one row for every reference, for all, or for each block of equal size of them.
    """
    largest = max(reference.values(), key=Tensor.numel)
    steps, rows = largest.shape[:2]
    samples = len(next(iter(sample.values()))[0])
    several = 1 < samples < rows
    size = max(BLOCK_ELEMENTS * steps // max(largest.numel(), 1), 1) if largest.is_cpu else steps
    blocks = []
    for start in range(0, steps, size):
        r, x = (
            {name: value[start : start + size] for name, value in values.items()}
            for values in (reference, sample)
        )
        if several:
            r = {name: value.unflatten(1, (samples, -1)) for name, value in r.items()}
            x = {name: value.unsqueeze(2) for name, value in x.items()}
        sums = Sums.between(r, x, weights) if stack.smoothed else None
        block = stack.cell.multipliers(r, x, sums)
        blocks.append({k: v.flatten(1, 2) for k, v in block.items()} if several else block)
    if len(blocks) == 1:
        return blocks[0]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def where_steps(stack: Stack, value: Tensor, padding: float) -> Tensor:
    """Return values of shape (steps, rows, ...) with another value at the steps of padding."""
    valid = stack.before_padding(len(value))
    if valid is None:
        return value
    return value.where(valid.reshape(*valid.shape, *[1] * (value.dim() - 2)), padding)


def enter_at_last_step(stack: Stack, grad: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cotangents of the outputs and of h after all steps, padding included.

    Parameters
    ----------
    stack : Stack
    grad : Tensor
        Cotangent of the outputs in reading order, of shape (steps, ..., rows, features).
    grad_h : Tensor
        Cotangent of h after the last step of every row, of shape (..., rows, features).
    """
    valid = stack.before_padding(len(grad))
    if valid is None or stack.lengths is None:
        return grad, grad_h
    shape = (*[1] * (grad.dim() - 3), -1, 1)
    grad = grad.where(valid.reshape(len(grad), *shape), 0.0)
    last = (stack.lengths - 1).reshape(1, *shape).expand(1, *grad.shape[1:])
    grad = grad.scatter_add(0, last, grad_h.expand_as(last[0]).unsqueeze(0))
    return grad, torch.zeros_like(grad_h)


def stack_backward(
    stack: Stack, multipliers: list[StepValues], grad: Tensor, grad_states: list[Tensor]
) -> list[Tensor]:
    """Backward pass through all layers and directions.

    Parameters
    ----------
    stack : Stack
    multipliers : list of dict
        Those of every layer and direction.
    grad : Tensor
        Cotangent of the outputs, with the time in the first dimension.
    grad_states : list of Tensor
        Cotangents of the final states, with the layers and directions in the first dimension.

    Returns
    -------
    list of Tensor
        Cotangents of the sequence and of the initial states, of these shapes.
    """
    grad_initial = [torch.zeros_like(state) for state in grad_states]
    for layer in reversed(range(stack.num_layers)):
        grad_directions = grad.chunk(len(stack.reverse), -1)
        grad = torch.zeros(())
        for direction, reverse in enumerate(stack.reverse):
            index = layer * len(stack.reverse) + direction
            grad_h, *grad_c = (state[index] for state in grad_states)
            grad_out, grad_h = enter_at_last_step(
                stack, stack.in_reading_order(grad_directions[direction], reverse), grad_h
            )
            grad_sequence, initial = stack.cell.backward(
                multipliers[index], grad_out, (grad_h, *grad_c), stack.weights[index]
            )
            grad = grad + stack.in_reading_order(grad_sequence, reverse)
            for of_all, of_layer in zip(grad_initial, initial, strict=True):
                of_all[index] = of_layer
    return [grad, *grad_initial]


# --- the rule ---------------------------------------------------------------------------------


def recurrent_rule(name: str, target: Target, cell: Cell, states: int) -> None:
    """Declare a recurrent operation: layers and directions of one cell with `states` states.

    Parameters
    ----------
    name : str
        The operator of fxshap.
    target : operator
        torch's operator, which stays in a graph that autocast has changed.
    cell : Cell
    states : int
    """

    @rule(target, OPERATORS[name], name="recurrent", grads_batched=True)
    def backward(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Any
    ) -> tuple[Tensor | None, ...]:
        if any(slot > states for slot in operation.slots):  # a weight varies
            operation = replace(operation, target=partial(recurrent, KERNELS[name]))
            batched = any(g is not None and g.dim() > 3 for g in grad)
            function = partial(for_each_cotangent, generic) if batched else generic
            return function(operation, reference, sample, grad)
        reverse = (False, True) if operation["bidirectional"] else (False,)
        lengths, smoothed = operation.get("lengths"), operation.get("smoothed", False)
        stack = Stack(cell, layer_weights(operation), reverse, lengths, smoothed)

        rows = rows_of(operation, reference)
        once = tuple(map(before_repetition, sample))
        sample = sample if rows_of(operation, once) is None else once

        def forward(endpoint: Tensors) -> StackOutput:
            count = rows_of(operation, endpoint)
            every = rows // count if rows and count else 1
            sequence, initial = sequence_and_states(operation, endpoint, states, every)
            return stack_forward(stack.with_every(every), sequence, initial)

        out_r = cached(reference[0], operation, lambda _: forward(reference))
        out_x = cached(sample[0], operation, lambda _: forward(sample))

        def all_multipliers() -> list[StepValues]:
            return stack_multipliers(stack, out_r.activations, out_x.activations)

        multipliers = cached_between(operation, reference[0], sample[0], all_multipliers)
        grad_outputs, grad_states = time_first_grads(operation, grad, out_r)
        grad_sequence, *grad_initial = stack_backward(stack, multipliers, grad_outputs, grad_states)
        time = -2 if operation["batch_first"] else -3
        grads = [grad_sequence.movedim(0, time), *(g.movedim(0, -3) for g in grad_initial)]
        return tuple(grads[slot] for slot in operation.slots)


recurrent_rule("lstm", aten.lstm.input, LSTM, states=2)
recurrent_rule("gru", aten.gru.input, GRU, states=1)
recurrent_rule("rnn_tanh", aten.rnn_tanh.input, RNN_TANH, states=1)
recurrent_rule("rnn_relu", aten.rnn_relu.input, RNN_RELU, states=1)


def rows_of(operation: Operation, endpoint: Tensors) -> int | None:
    """Return how many rows an endpoint has; ``None`` if its values have different numbers."""
    rows = {
        value.shape[0 if slot == 0 and operation["batch_first"] else 1]
        for slot, value in zip(operation.slots, endpoint, strict=True)
    }
    return rows.pop() if len(rows) == 1 else None


def sequence_and_states(
    operation: Operation, endpoint: Tensors, states: int, every: int
) -> tuple[Tensor, State]:
    """Return the sequence, with the time first, and the initial states at one endpoint.

    Constant ones have as many rows as the references. Where a row of the endpoint stands for
    `every` references, they are those of the first.
    """
    flat = list(operation.arguments)
    for slot, value in zip(operation.slots, endpoint, strict=True):
        flat[slot] = value
    (sequence, initial, *_), _ = pytree.tree_unflatten(flat, operation.structure)
    sequence = sequence.transpose(0, 1) if operation["batch_first"] else sequence
    values = [sequence, *(initial if states > 1 else (initial,))]
    sequence, *initial = (
        value if slot in operation.slots else value[:, ::every] for slot, value in enumerate(values)
    )
    return sequence, tuple(initial)


def time_first_grads(
    operation: Operation, grad: Any, output: StackOutput
) -> tuple[Tensor, list[Tensor]]:
    """Return the cotangents of the outputs and of the final states, zeros in place of ``None``.

    The time, or the layers, is the first dimension, before the dimension of batched cotangents.
    """
    grad_outputs, *grad_states = grad
    batch = next(g.shape[:-3] for g in grad if g is not None)
    if grad_outputs is None:
        grad_outputs = output.outputs.new_zeros(*batch, *output.outputs.shape)
    elif operation["batch_first"]:
        grad_outputs = grad_outputs.transpose(-3, -2)
    states = [
        (final.new_zeros(*batch, *final.shape) if g is None else g).movedim(-3, 0)
        for g, final in zip(grad_states, output.states, strict=True)
    ]
    return grad_outputs.movedim(-3, 0), states


def layer_weights(operation: Operation) -> list[Weights]:
    """Group the flat list of parameters by layer and direction."""
    params = operation["params"]
    directions = 2 if operation["bidirectional"] else 1
    size = len(params) // (operation["num_layers"] * directions)
    biased = operation["has_biases"]
    groups = [params[i : i + size] for i in range(0, len(params), size)]
    return [
        Weights(
            group[0],
            group[1],
            group[2] if biased else None,
            group[3] if biased else None,
            group[-1] if size in (3, 5) else None,
        )
        for group in groups
    ]
