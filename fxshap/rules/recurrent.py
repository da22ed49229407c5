"""Recurrent layers: stacks of layers and directions of the cells of :mod:`.recurrent_cells`.

A cell in the user's own loop, such as ``nn.LSTMCell``, is decomposed into the formulas of one step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.rules.core.caching import cached, cached_between
from fxshap.rules.core.dispatch import for_each_cotangent
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Target, Tensors, decomposition, rule
from fxshap.rules.recurrent_cells import (
    GRU,
    LSTM,
    RNN_RELU,
    RNN_TANH,
    Cell,
    State,
    StepValues,
    Weights,
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
    """

    cell: Cell
    weights: list[Weights]
    reverse: tuple[bool, ...]

    @property
    def num_layers(self) -> int:
        """The number of layers."""
        return len(self.weights) // len(self.reverse)


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
            steps = sequence.flip(0) if reverse else sequence
            out, final, values = stack.cell.forward(steps, initial, stack.weights[index])
            outputs.append(out.flip(0) if reverse else out)
            activations.append(values)
            finals.append(final)
        sequence = torch.cat(outputs, -1)
    states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    return StackOutput(activations, sequence, states)


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
            grad_out = grad_directions[direction]
            grad_sequence, initial = stack.cell.backward(
                multipliers[index],
                grad_out.flip(0) if reverse else grad_out,
                tuple(state[index] for state in grad_states),
                stack.weights[index],
            )
            grad = grad + (grad_sequence.flip(0) if reverse else grad_sequence)
            for of_all, of_layer in zip(grad_initial, initial, strict=True):
                of_all[index] = of_layer
    return [grad, *grad_initial]


# --- the rule ---------------------------------------------------------------------------------


def recurrent_rule(target: Target, cell: Cell, states: int) -> None:
    """Declare a recurrent operation: layers and directions of one cell with `states` states."""

    @rule(target, name="recurrent", grads_batched=True)
    def backward(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Any
    ) -> tuple[Tensor | None, ...]:
        if any(slot > states for slot in operation.slots):  # a weight varies
            batched = any(g is not None and g.dim() > 3 for g in grad)
            function = partial(for_each_cotangent, generic) if batched else generic
            return function(operation, reference, sample, grad)
        reverse = (False, True) if operation["bidirectional"] else (False,)
        stack = Stack(cell, layer_weights(operation), reverse)

        def forward(endpoint: Tensors) -> StackOutput:
            return stack_forward(stack, *sequence_and_states(operation, endpoint, states))

        out_r = cached(reference[0], operation, lambda _: forward(reference))
        out_x = cached(sample[0], operation, lambda _: forward(sample))

        def all_multipliers() -> list[StepValues]:
            pairs = zip(out_r.activations, out_x.activations, strict=True)
            return [cell.multipliers(r, x) for r, x in pairs]

        multipliers = cached_between(operation, reference[0], sample[0], all_multipliers)
        grad_outputs, grad_states = time_first_grads(operation, grad, out_r)
        grad_sequence, *grad_initial = stack_backward(stack, multipliers, grad_outputs, grad_states)
        time = -2 if operation["batch_first"] else -3
        grads = [grad_sequence.movedim(0, time), *(g.movedim(0, -3) for g in grad_initial)]
        return tuple(grads[slot] for slot in operation.slots)


recurrent_rule(aten.lstm.input, LSTM, states=2)
recurrent_rule(aten.gru.input, GRU, states=1)
recurrent_rule(aten.rnn_tanh.input, RNN_TANH, states=1)
recurrent_rule(aten.rnn_relu.input, RNN_RELU, states=1)


def sequence_and_states(
    operation: Operation, endpoint: Tensors, states: int
) -> tuple[Tensor, State]:
    """Return the sequence, with the time first, and the initial states at one endpoint.

    Constant ones have as many rows as the references, but the sample may be a single row.
    """
    flat = list(operation.arguments)
    for slot, value in zip(operation.slots, endpoint, strict=True):
        flat[slot] = value
    (sequence, initial, *_), _ = pytree.tree_unflatten(flat, operation.structure)
    sequence = sequence.transpose(0, 1) if operation["batch_first"] else sequence
    initial = tuple(initial) if states > 1 else (initial,)
    rows = endpoint[0].shape[0 if operation["batch_first"] and operation.slots[0] == 0 else 1]
    return sequence[:, :rows], tuple(state[:, :rows] for state in initial)


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


# --- single steps, in a loop of the user's ----------------------------------------------------


@decomposition(aten.lstm_cell.default)
def lstm_cell(
    input: Tensor,
    hx: list[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> State:
    """i, f, o = s(z), g = tanh(z), c' = f c + i g, h' = o tanh(c')."""
    h, c = hx
    i, f, g, o = (F.linear(input, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@decomposition(aten.gru_cell.default)
def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """a, z = s(.), n = tanh(input + a * hidden), h' = n + z (h - n)."""
    a_i, z_i, n_i = F.linear(input, w_ih, b_ih).chunk(3, -1)
    a_h, z_h, n_h = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    n = (n_i + (a_i + a_h).sigmoid() * n_h).tanh()
    return n + (z_i + z_h).sigmoid() * (hx - n)


def rnn_cell_decomposition(target: Target, activation: Callable[[Tensor], Tensor]) -> None:
    """Declare h' = activation(W x + U h)."""

    @decomposition(target)
    def rnn_cell(
        input: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        return activation(F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))


rnn_cell_decomposition(aten.rnn_tanh_cell.default, torch.tanh)
rnn_cell_decomposition(aten.rnn_relu_cell.default, torch.relu)
