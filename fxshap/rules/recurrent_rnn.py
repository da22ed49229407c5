"""The RNN cell (Elman 1990): h' = activation(W x + U h)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxshap.ops.recurrent import OPERATORS
from fxshap.rules.piecewise import relu_secant
from fxshap.rules.recurrent_cells import (
    Cell,
    GateSums,
    State,
    StepValues,
    Sums,
    Weights,
    run_layer,
    slopes,
    states_before,
    steps_backward,
)
from fxshap.rules.univariate import tanh_secant


def rnn(target: Any, secant: Callable[..., Tensor], activation: Callable[[Tensor], Tensor]) -> Cell:
    """Return the cell, given its kernel and the secant of its activation."""

    def forward(
        sequence: Tensor, state: State, weights: Weights, smoothed: bool
    ) -> tuple[Tensor, State, StepValues]:
        outputs, final = run_layer(target, sequence, state[0].unsqueeze(0), weights)
        z = F.linear(sequence, weights.w_ih, weights.b_ih)
        z = z + F.linear(states_before(state[0], outputs), weights.w_hh, weights.b_hh)
        return outputs, (final.squeeze(0),), {"z": z}

    def multipliers(r: StepValues, x: StepValues, sums: Sums | None) -> StepValues:
        variance = None if sums is None else sums.variance
        orders = slopes(secant, activation, r["z"], x["z"], variance)
        change = {} if sums is None else {"change": sums.change}
        return {"dh_dz": torch.stack(orders, -2), **change}

    def backward(
        blocks: Iterable[StepValues], grad: Tensor, grad_state: State, weights: Weights
    ) -> tuple[Tensor, State]:
        sums = GateSums(weights.w_hh, weights.w_ih)
        (grad_h,) = grad_state
        grad_sequence = []
        for grad_t, step in steps_backward(blocks, grad):
            grad_z = (grad_h + grad_t).unsqueeze(-2) * step["dh_dz"]
            grad_h, grad_input = sums.backward(grad_z, step.get("change"))
            grad_sequence.append(grad_input)
        return torch.stack(grad_sequence[::-1]), (grad_h,)

    return Cell(forward, multipliers, backward)


RNN_TANH = rnn(OPERATORS["rnn_tanh"], tanh_secant, torch.tanh)
RNN_RELU = rnn(OPERATORS["rnn_relu"], relu_secant, torch.relu)
