"""What the recurrent cells share: their interface, and parts of their formulas.

Every step of a cell is a chain of other rules: secants for the activations (:mod:`.univariate`),
midpoints for the products of gates (:mod:`.products`), and matrices for the rest. A cell is three
pure functions of one layer in one direction, with the time in the first dimension:

    forward(sequence, state, weights, smoothed)        -> outputs, final state, activations
    multipliers(activations_r, activations_x, sums)    -> multipliers at every step
    backward(blocks, grad, grad_state, weights)        -> grad of sequence, grad of initial state

The multipliers of many steps are computed together, in blocks that fit into the caches of a
processor. The backward pass takes the blocks one after another, the last steps first, and only its
recursion runs step by step.

Cotangents may be batched, one for each output of the model, in dimensions between the time and the
rows. Per-operation overhead dominates a step, so that all of them go backward together.

With the variance rule the gates have the multipliers S and T of :mod:`.smoothed_activations`. Their
sums are W x + U h, whose terms are the elements of x and h, so that with the squares of the weights

    v = W^2 dx^2 + U^2 dh^2,      grad_x = S g W + (T g W^2) dx

and likewise for h. The product of a gate, as f c, is one term of the sum that it is part of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxshap.ops.matrices import multiply_rows
from fxshap.rules.core.cancellation import sequential_factors
from fxshap.rules.core.tracing import any_unless_tracing
from fxshap.rules.smoothed_activations import finite_change, smoothed_multipliers

#: The hidden state h and, for an LSTM, the cell state c.
State = tuple[Tensor, ...]
#: Activations or multipliers at every step, by name.
StepValues = dict[str, Tensor]


class Weights(NamedTuple):
    """The weights of one layer in one direction; absent ones are ``None``."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None

    def present(self) -> list[Tensor]:
        """Return the weights that are not ``None``, in torch's order."""
        return [weight for weight in self if weight is not None]


class Sums(NamedTuple):
    """What changes in the sums W x + U h before the gates, for the variance rule.

    Attributes
    ----------
    change : Tensor
        h and x at the sample minus those at the reference, concatenated, at every step.
    input_variance, state_variance : Tensor
        Those of W x and U h, with all gates in the last dimension.
    """

    change: Tensor
    input_variance: Tensor
    state_variance: Tensor

    @classmethod
    def between(cls, r: StepValues, x: StepValues, weights: Weights) -> Sums:
        """Return the sums of a layer, given its inputs and states at both endpoints."""
        inputs, states = (finite_change(r[name], x[name]) for name in ("inputs", "states"))
        of_inputs = F.linear(inputs.square(), weights.w_ih.square())
        of_states = F.linear(states.square(), weights.w_hh.square())
        return cls(torch.cat([states, inputs], -1), of_inputs, of_states)

    @property
    def variance(self) -> Tensor:
        """The variance of W x + U h."""
        return self.input_variance + self.state_variance


class Cell(NamedTuple):
    """A recurrent cell, as three functions over a sequence; see the module.

    `carry` names the multiplier from the cell state to the next one, if there is a cell state.
    """

    forward: Callable[[Tensor, State, Weights, bool], tuple[Tensor, State, StepValues]]
    multipliers: Callable[[StepValues, StepValues, Sums | None], StepValues]
    backward: Callable[[Iterable[StepValues], Tensor, State, Weights], tuple[Tensor, State]]
    carry: str = ""


def slopes(
    secant: Callable[[Tensor, Tensor], Tensor],
    function: Callable[[Tensor], Tensor],
    r: Tensor,
    x: Tensor,
    variance: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the secant of a function; with a variance, S and T."""
    if variance is None:
        return (secant(r, x),)
    return smoothed_multipliers(secant, function, r, x, variance)


class GateSums:
    """The backward pass through the sums U h + W x before the gates.

    Parameters
    ----------
    of_states, of_inputs : Tensor
        U and W, of shape (units of all gates, states or inputs).
    """

    def __init__(self, of_states: Tensor, of_inputs: Tensor) -> None:
        self.sizes = [of_states.shape[1], of_inputs.shape[1]]
        self.weight = torch.cat([of_states, of_inputs], 1)
        self._square: Tensor | None = None

    def backward(self, grads: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the cotangents of h and of x for those of the sums and of their variances.

        Parameters
        ----------
        grads : Tensor
            Of shape (..., 1 or 2, units): of the sums and, with the variance rule, of the
            variances.
        change : Tensor, optional
            That of :class:`Sums`.
        """
        of_mean, *of_variance = grads.unbind(-2)
        grad = multiply_rows(of_mean, self.weight)
        for g in of_variance:
            assert change is not None
            if self._square is None:
                self._square = self.weight.square()
            grad = torch.addcmul(grad, multiply_rows(g, self._square), change)
        grad_h, grad_x = grad.split(self.sizes, -1)
        return grad_h, grad_x


def steps_backward(
    blocks: Iterable[StepValues], grad: Tensor
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield the cotangent of the output and the multipliers of every step, the last step first.

    Parameters
    ----------
    blocks : iterable of dict
        The multipliers of consecutive steps, the last block first.
    grad : Tensor
        Of shape (steps, ..., rows, features).
    """
    remaining = list(grad)
    for block in blocks:
        for values in reversed(list(zip(*block.values(), strict=True))):
            yield remaining.pop(), dict(zip(block, values, strict=True))


#: As :data:`.cancellation.MAX_MIXED_RATIO`. It is smaller because the parts that cancel come by
#: several paths through a cell and through time.
MAX_MIXED_RATIO = 1e2


def gate_sums(a_r: Tensor, b_r: Tensor, a_x: Tensor, b_x: Tensor) -> tuple[Tensor, Tensor]:
    """Return twice the midpoints of a gate `a` and of the values `b` that it multiplies.

    Where the values are huge, only one order of both counts: see
    :func:`.cancellation.sequential_factors`.
    """
    sums = a_r + a_x, b_r + b_x
    largest = torch.maximum(b_r.abs().amax(), b_x.abs().amax())
    if any_unless_tracing(largest > MAX_MIXED_RATIO):  # a gate is at most 1
        return sequential_factors((a_r, b_r), (a_x, b_x), sums, MAX_MIXED_RATIO)
    return sums


def gate_midpoints(a_r: Tensor, b_r: Tensor, a_x: Tensor, b_x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the midpoints of a gate `a` and of the values `b` that it multiplies."""
    a, b = gate_sums(a_r, b_r, a_x, b_x)
    return a / 2, b / 2


def run_layer(target: Any, sequence: Tensor, state: Any, weights: Weights) -> tuple[Tensor, ...]:
    """Call torch's kernel for one layer in one direction, with the time in the first dimension."""
    num_layers, dropout, train, bidirectional, batch_first = 1, 0.0, False, False, False
    outputs: tuple[Tensor, ...] = target(
        sequence, state, weights.present(), weights.b_ih is not None,
        num_layers, dropout, train, bidirectional, batch_first,
    )  # fmt: skip
    return outputs


def states_before(h0: Tensor, outputs: Tensor) -> Tensor:
    """Return the hidden state at the start of every step."""
    return torch.cat([h0.unsqueeze(0), outputs[:-1]])
