"""Stacks of layers and directions of the cells of :mod:`.recurrent_cells`.

The rows may have different numbers of steps. Every direction reads the steps of a row first, and
the padding after them, so that padding changes nothing before it. Its multipliers are 0, and the
cotangents of the final states enter at the last step of each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxshap.rules.core.blocks import BLOCK_ELEMENTS
from fxshap.rules.recurrent_cells import (
    Cell,
    State,
    StepValues,
    Sums,
    Weights,
    states_before,
)


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

    def of_rows(self, rows: slice) -> Stack:
        """Return the same layers for some of the rows."""
        return self if self.lengths is None else self._replace(lengths=self.lengths[rows])

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
            out, final, values = stack.cell.forward(
                steps, initial, stack.weights[index], stack.smoothed
            )
            if stack.smoothed:
                # A copy: values that are cached for a tensor must not be views of it.
                values |= {"inputs": steps.clone(), "states": states_before(initial[0], out)}
            outputs.append(stack.in_reading_order(out, reverse))
            activations.append(values)
            finals.append(final)
        sequence = torch.cat(outputs, -1)
    states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    return StackOutput(activations, sequence, states)


#: The multipliers of a layer in one direction: blocks of consecutive steps, the last block first.
Blocks = Iterable[StepValues]


class StackPairs(NamedTuple):
    """The layers of a recurrent operation between samples and their references.

    Attributes
    ----------
    stack : Stack
        Of one row for each pair.
    reference, sample : list of dict
        The activations of every layer and direction, of shape (steps, samples, references, ...):
        those of the reference with 1 in place of the samples if all have the same references, and
        those of the sample with 1 in place of the references.
    """

    stack: Stack
    reference: list[StepValues]
    sample: list[StepValues]

    @classmethod
    def of(
        cls, stack: Stack, reference: list[StepValues], sample: list[StepValues], rows: int
    ) -> StackPairs:
        """Pair each sample with as many references, of `rows` in all or the same for all."""
        samples = len(next(iter(sample[0].values()))[0])
        r, x = (
            [
                {name: value.unflatten(1, (-1, each)) for name, value in values.items()}
                for values in endpoint
            ]
            for endpoint, each in ((reference, rows // samples), (sample, 1))
        )
        return cls(stack, r, x)

    def parts(self) -> list[tuple[slice, StackPairs]]:
        """Split the samples, so that one step of a part fits into the caches of a processor.

        Returns
        -------
        list of (slice, StackPairs)
            The rows of each part, and its pairs.
        """
        samples, largest = len(next(iter(self.sample[0].values()))[0]), self.largest()
        each = largest.shape[2]
        size = max(BLOCK_ELEMENTS.get() // largest[0, 0].numel(), 1) if largest.is_cpu else samples
        parts = []
        for start in range(0, samples, size):
            part = slice(start, min(start + size, samples))
            rows = slice(part.start * each, part.stop * each)
            r, x = ([of_samples(v, part) for v in values] for values in self[1:])
            parts.append((rows, StackPairs(self.stack.of_rows(rows), r, x)))
        return parts

    def largest(self) -> Tensor:
        """Return the largest activation of the first layer."""
        return max(self.reference[0].values(), key=Tensor.numel)

    def multipliers(self) -> list[Iterator[StepValues]]:
        """Return the multipliers of every layer and direction, computed when they are read."""
        layers = zip(self.reference, self.sample, self.stack.weights, strict=True)
        return [layer_multipliers(self.stack, *layer) for layer in layers]


def of_samples(values: StepValues, part: slice) -> StepValues:
    """Return the activations of some samples; those that all samples share are the same."""
    return {name: v[:, part] if v.shape[1] > 1 else v for name, v in values.items()}


def layer_multipliers(
    stack: Stack, reference: StepValues, sample: StepValues, weights: Weights
) -> Iterator[StepValues]:
    """Yield the multipliers of one layer in one direction, those of padding 0."""
    largest = max(reference.values(), key=Tensor.numel)
    steps, samples = len(largest), len(next(iter(sample.values()))[0])
    elements = largest[0, 0].numel() * samples
    size = max(BLOCK_ELEMENTS.get() // elements, 1) if largest.is_cpu else steps
    valid = stack.before_padding(steps)
    for stop in range(steps, 0, -size):
        block = slice(max(stop - size, 0), stop)
        r, x = (
            {name: value[block] for name, value in values.items()} for values in (reference, sample)
        )
        sums = Sums.between(r, x, weights) if stack.smoothed else None
        multipliers = stack.cell.multipliers(r, x, sums)
        multipliers = {name: value.flatten(1, 2) for name, value in multipliers.items()}
        if valid is not None:
            multipliers = {
                name: where_valid(value, valid[block], 1.0 if name == stack.cell.carry else 0.0)
                for name, value in multipliers.items()
            }
        yield multipliers


def where_valid(value: Tensor, valid: Tensor, padding: float) -> Tensor:
    """Return values of shape (steps, rows, ...) with another value at the steps of padding."""
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
    stack: Stack, multipliers: Sequence[Blocks], grad: Tensor, grad_states: Sequence[Tensor]
) -> list[Tensor]:
    """Backward pass through all layers and directions.

    Parameters
    ----------
    stack : Stack
    multipliers : sequence of iterable of dict
        Those of every layer and direction.
    grad : Tensor
        Cotangent of the outputs, with the time in the first dimension.
    grad_states : sequence of Tensor
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
