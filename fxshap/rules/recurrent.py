"""Recurrent layers: stacks of layers and directions, with or without initial states and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.ops.recurrent import KERNELS, OPERATORS, recurrent
from fxshap.rules.core.caching import before_repetition, cached, cached_between, caches_between
from fxshap.rules.core.dispatch import for_each_cotangent
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Target, Tensors, rule
from fxshap.rules.core.tracing import is_tracing_rules
from fxshap.rules.recurrent_cells import Cell, State, Weights
from fxshap.rules.recurrent_gru import GRU
from fxshap.rules.recurrent_lstm import LSTM
from fxshap.rules.recurrent_rnn import RNN_RELU, RNN_TANH
from fxshap.rules.recurrent_stack import (
    Blocks,
    Stack,
    StackOutput,
    StackPairs,
    stack_backward,
    stack_forward,
)

aten = torch.ops.aten


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

        once = tuple(map(before_repetition, sample))
        sample = sample if rows_of(operation, once) is None else once
        samples, rows = rows_of(operation, sample), rows_of_grads(operation, grad)

        # Constants have as many rows as the references: here those of the first of each sample.
        first = slice(None, None, rows // (samples or rows))
        out_r = forward_references(operation, stack, reference, rows, samples or rows)
        out_x = cached(
            sample[0],
            operation,
            lambda _: stack_forward(
                stack.of_rows(first), *sequence_and_states(operation, sample, first)
            ),
        )
        pairs = StackPairs.of(stack, out_r.activations, out_x.activations, rows)
        grads = backward_in_parts(
            operation,
            (reference[0], sample[0]),
            pairs,
            *time_first_grads(operation, grad, rows, out_r),
        )
        time = -2 if operation["batch_first"] else -3
        grads = [grads[0].movedim(0, time), *(g.movedim(0, -3) for g in grads[1:])]
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


def rows_of_grads(operation: Operation, grad: Any) -> int:
    """Return how many rows the cotangents of the outputs and of the final states have."""
    index, present = next((i, g) for i, g in enumerate(grad) if g is not None)
    rows: int = present.shape[-3 if index == 0 and operation["batch_first"] else -2]
    return rows


def backward_in_parts(
    operation: Operation,
    taps: tuple[Tensor, Tensor],
    pairs: StackPairs,
    grad: Tensor,
    grad_states: list[Tensor],
) -> list[Tensor]:
    """Return the result of :func:`stack_backward`, part by part of the samples.

    Parameters
    ----------
    operation : Operation
    taps : pair of Tensor
        A tapped value at the reference and at the sample, for which multipliers are cached.
    pairs : StackPairs
    grad, grad_states
        As for :func:`stack_backward`.
    """
    parts = pairs.parts()
    if caches_between(taps[1]):
        multipliers: Sequence[Sequence[Blocks]] = cached_between(
            operation,
            *taps,
            lambda: [[list(blocks) for blocks in part.multipliers()] for _, part in parts],
        )
    else:
        multipliers = [part.multipliers() for _, part in parts]
    of_parts = [
        stack_backward(
            part.stack, blocks, grad[..., rows, :], [state[..., rows, :] for state in grad_states]
        )
        for (rows, part), blocks in zip(parts, multipliers, strict=True)
    ]
    return [torch.cat(of_rows, -2) for of_rows in zip(*of_parts, strict=True)]


def forward_references(
    operation: Operation, stack: Stack, reference: Tensors, rows: int, samples: int
) -> StackOutput:
    """Return the forward pass of the references: of those of one sample if all share them.

    Parameters
    ----------
    operation : Operation
    stack : Stack
    reference : sequence of Tensor
        The values of the varying arguments.
    rows, samples : int
        The number of pairs and of samples.
    """

    def forward(_: Tensor) -> StackOutput:
        return stack_forward(stack, *sequence_and_states(operation, reference, slice(None)))

    def forward_shared(value: Tensor) -> tuple[StackOutput, int]:
        sequence, states = sequence_and_states(operation, reference, slice(None))
        values = [sequence, *states, *([] if stack.lengths is None else [stack.lengths[None]])]
        if all(repeats(value, samples) for value in values):
            count = slice(rows // samples)
            shared = (state[:, count] for state in states)
            return stack_forward(stack.of_rows(count), sequence[:, count], tuple(shared)), samples
        return cached(value, operation, forward), samples

    if samples in (1, rows) or is_tracing_rules() or not operation.name:
        return cached(reference[0], operation, forward)
    # With a number, so that compiled functions do not take it for an argument.
    output, _ = cached(reference[0], f"{operation.name} for {samples} samples", forward_shared)
    return output


def repeats(value: Tensor, count: int) -> bool:
    """Return True if the second dimension has `count` blocks of equal values."""
    blocks = value.unflatten(1, (count, -1))
    return bool((blocks == blocks[:, :1]).all())


def sequence_and_states(
    operation: Operation, endpoint: Tensors, rows: slice
) -> tuple[Tensor, State]:
    """Return the sequence, with the time first, and the initial states at one endpoint.

    Constant ones have as many rows as the references, of which `rows` are chosen.
    """
    flat = list(operation.arguments)
    for slot, value in zip(operation.slots, endpoint, strict=True):
        flat[slot] = value
    (sequence, initial, *_), _ = pytree.tree_unflatten(flat, operation.structure)
    sequence = sequence.transpose(0, 1) if operation["batch_first"] else sequence
    values = [sequence, *([initial] if isinstance(initial, Tensor) else initial)]
    sequence, *initial = (
        value if slot in operation.slots else value[:, rows] for slot, value in enumerate(values)
    )
    return sequence, tuple(initial)


def time_first_grads(
    operation: Operation, grad: Any, rows: int, output: StackOutput
) -> tuple[Tensor, list[Tensor]]:
    """Return the cotangents of the outputs and of the final states, zeros in place of ``None``.

    The time, or the layers, is the first dimension, before the dimension of batched cotangents.
    """
    grad_outputs, *grad_states = grad
    batch = next(g.shape[:-3] for g in grad if g is not None)

    def zeros(like: Tensor) -> Tensor:
        return like.new_zeros(*batch, len(like), rows, like.shape[-1])

    if grad_outputs is None:
        grad_outputs = zeros(output.outputs)
    elif operation["batch_first"]:
        grad_outputs = grad_outputs.transpose(-3, -2)
    states = [
        (zeros(final) if g is None else g).movedim(-3, 0)
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
