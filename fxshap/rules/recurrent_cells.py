"""LSTM, GRU and RNN cells over a sequence: forward pass, multipliers of the gates, backward pass.

Every step of a cell is a chain of other rules: secants for the activations (:mod:`.univariate`),
midpoints for the products of gates (:mod:`.products`), and matrices for the rest. The multipliers
of a whole sequence are computed at once; only the recursion of the backward pass runs step by step.

A cell is three pure functions of one layer in one direction, with the time in the first dimension:

    forward(sequence, state, weights)                  -> outputs, final state, activations
    multipliers(activations_r, activations_x)          -> multipliers at every step
    backward(multipliers, grad, grad_state, weights)   -> grad of sequence, grad of initial state

Cotangents may be batched, one for each output of the model, in dimensions between the time and the
rows. Per-operation overhead dominates a step, so that all of them go backward together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxshap.ops.recurrent import OPERATORS
from fxshap.rules.core.cancellation import abs_aminmax, sequential_factors
from fxshap.rules.core.tracing import any_unless_tracing
from fxshap.rules.univariate import relu_secant, sigmoid_secant, tanh_secant

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


class Cell(NamedTuple):
    """A recurrent cell, as three functions over a sequence; see the module.

    `carry` names the multiplier from the cell state to the next one, if there is a cell state.
    """

    forward: Callable[[Tensor, State, Weights], tuple[Tensor, State, StepValues]]
    multipliers: Callable[[StepValues, StepValues], StepValues]
    backward: Callable[[StepValues, Tensor, State, Weights], tuple[Tensor, State]]
    carry: str = ""


#: As :data:`.cancellation.MAX_MIXED_RATIO`. It is smaller because the parts that cancel come by
#: several paths through a cell and through time.
MAX_MIXED_RATIO = 1e2


def gate_midpoints(a_r: Tensor, b_r: Tensor, a_x: Tensor, b_x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the midpoints of a gate `a` and of the values `b` that it multiplies.

    Where the values are huge, only one order of both counts: see
    :func:`.cancellation.sequential_factors`.
    """
    sums = a_r + a_x, b_r + b_x
    largest = torch.maximum(abs_aminmax(b_r)[1], abs_aminmax(b_x)[1])
    if any_unless_tracing(largest > MAX_MIXED_RATIO):  # a gate is at most 1
        sums = sequential_factors((a_r, b_r), (a_x, b_x), sums, MAX_MIXED_RATIO)
    return sums[0] / 2, sums[1] / 2


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


# --- LSTM (Hochreiter and Schmidhuber 1997) ---------------------------------------------------


def lstm_forward(
    sequence: Tensor, state: State, weights: Weights
) -> tuple[Tensor, State, StepValues]:
    """i, f, o = s(z), g = tanh(z), c' = f c + i g, h = o tanh(c').

    torch's own kernel gives h. The gates of all steps follow from h at once, and only c needs a
    loop over the steps.
    """
    outputs, *final = run_layer(
        OPERATORS["lstm"], sequence, [s.unsqueeze(0) for s in state], weights
    )
    h0, c = state
    z = F.linear(sequence, weights.w_ih, weights.b_ih)
    z = z + F.linear(states_before(h0, outputs), weights.w_hh, weights.b_hh)
    i, f, g, o = z.chunk(4, -1)
    activations = {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
    cells = [c]
    for forget, gain in zip(activations["f"], activations["i"] * activations["g"], strict=True):
        cells.append(torch.addcmul(gain, forget, cells[-1]))
    c = torch.stack(cells)
    activations |= {"c": c[:-1], "c_next": c[1:], "tanh_c_next": c[1:].tanh()}
    activations["z"] = torch.cat([i, f, 2 * g, o], -1)  # tanh g = 2 s(2g) - 1
    return outputs, tuple(s.squeeze(0) for s in final), activations


def lstm_multipliers(r: StepValues, x: StepValues) -> StepValues:
    """Return dh/dc', dc'/dz for the gates i, f and g, dh/dz for the gate o, and dc'/dc.

    Each is a product of secants and midpoints: di, df, d2g and do are the secants of the sigmoids,
    and the names of the formulas of :func:`lstm_forward` are midpoints. The last dimension but one
    is for the gates.
    """
    di, df, d2g, do = sigmoid_secant(r["z"], x["z"]).chunk(4, -1)
    i, g, o, tanh_c = ((r[name] + x[name]) / 2 for name in ("i", "g", "o", "tanh_c_next"))
    f, c = gate_midpoints(r["f"], r["c"], x["f"], x["c"])
    return {
        "dh_dc": (o * tanh_secant(r["c_next"], x["c_next"])).unsqueeze(-2),
        "dc_dz": torch.stack([g * di, c * df, 4 * i * d2g], -2),
        "dh_dz": (tanh_c * do).unsqueeze(-2),
        "dc_dc": f.unsqueeze(-2),
    }


def lstm_backward(
    multipliers: StepValues, grad: Tensor, grad_state: State, weights: Weights
) -> tuple[Tensor, State]:
    """Backward pass of an LSTM layer; every tensor has a dimension for the gates."""
    grad_h, grad_c = (g.unsqueeze(-2) for g in grad_state)
    grad_z = grad.new_empty(*grad.shape[:-1], 4, grad_c.shape[-1])
    gate_slices = zip(grad_z[..., :3, :], grad_z[..., 3:, :], grad_z.flatten(-2), strict=True)
    steps = zip(grad.unsqueeze(-2), *multipliers.values(), gate_slices, strict=True)
    for grad_t, dh_dc, dc_dz, dh_dz, dc_dc, (grad_ifg, grad_o, all_gates) in reversed(list(steps)):
        grad_h = grad_h + grad_t
        grad_y = grad_h if weights.w_hr is None else grad_h @ weights.w_hr
        grad_c = torch.addcmul(grad_c, grad_y, dh_dc)
        torch.mul(grad_c, dc_dz, out=grad_ifg)
        torch.mul(grad_y, dh_dz, out=grad_o)
        grad_h = (all_gates @ weights.w_hh).unsqueeze(-2)
        grad_c = grad_c * dc_dc
    return grad_z.flatten(-2) @ weights.w_ih, (grad_h.squeeze(-2), grad_c.squeeze(-2))


LSTM = Cell(lstm_forward, lstm_multipliers, lstm_backward, carry="dc_dc")

# --- GRU (Cho et al. 2014) --------------------------------------------------------------------


def gru_forward(
    sequence: Tensor, state: State, weights: Weights
) -> tuple[Tensor, State, StepValues]:
    """a, z = s(.), n = tanh(input + a * hidden), h' = n + z (h - n).

    `a` is the reset gate and `z` the update gate; the activations are their pre-activations.
    """
    outputs, final = run_layer(OPERATORS["gru"], sequence, state[0].unsqueeze(0), weights)
    h = states_before(state[0], outputs)
    a_i, z_i, n_i = F.linear(sequence, weights.w_ih, weights.b_ih).chunk(3, -1)
    a_h, z_h, n_h = F.linear(h, weights.w_hh, weights.b_hh).chunk(3, -1)
    a = a_i + a_h
    activations = {"a": a, "z": z_i + z_h, "n": n_i + a.sigmoid() * n_h, "n_h": n_h, "h": h}
    return outputs, (final.squeeze(0),), activations


def gru_multipliers(r: StepValues, x: StepValues) -> StepValues:
    """Return dh'/d(pre-activations), by way of the input and by way of h, and dh'/dh."""
    a, n_h = gate_midpoints(r["a"].sigmoid(), r["n_h"], x["a"].sigmoid(), x["n_h"])
    old_r, old_x = (values["h"] - values["n"].tanh() for values in (r, x))
    z, old = gate_midpoints(r["z"].sigmoid(), old_r, x["z"].sigmoid(), old_x)
    dn = (1 - z) * tanh_secant(r["n"], x["n"])
    dz = old * sigmoid_secant(r["z"], x["z"])
    da = dn * n_h * sigmoid_secant(r["a"], x["a"])
    dh_dinput, dh_dhidden = (torch.stack([da, dz, n], -2) for n in (dn, dn * a))
    return {"dh_dinput": dh_dinput, "dh_dhidden": dh_dhidden, "dh_dh": z}


def gru_backward(
    multipliers: StepValues, grad: Tensor, grad_state: State, weights: Weights
) -> tuple[Tensor, State]:
    """Backward pass of a GRU layer."""
    dh_dinput, dh_dhidden, dh_dh = multipliers.values()
    (grad_h,) = grad_state
    grad_input = grad.new_empty(*grad.shape[:-1], *dh_dinput.shape[-2:])
    steps = zip(grad, dh_dinput, dh_dhidden, dh_dh, grad_input, strict=True)
    for grad_t, dh_dinput_t, dh_dhidden_t, dh_dh_t, grad_input_t in reversed(list(steps)):
        grad_h = (grad_h + grad_t).unsqueeze(-2)
        torch.mul(grad_h, dh_dinput_t, out=grad_input_t)
        through_gates = (grad_h * dh_dhidden_t).flatten(-2) @ weights.w_hh
        grad_h = torch.addcmul(through_gates, grad_h.squeeze(-2), dh_dh_t)
    return grad_input.flatten(-2) @ weights.w_ih, (grad_h,)


GRU = Cell(gru_forward, gru_multipliers, gru_backward)

# --- RNN (Elman 1990) -------------------------------------------------------------------------


def rnn(target: Any, secant: Callable[..., Tensor]) -> Cell:
    """Return the cell h' = activation(W x + U h), given the kernel and its activation's secant."""

    def forward(
        sequence: Tensor, state: State, weights: Weights
    ) -> tuple[Tensor, State, StepValues]:
        outputs, final = run_layer(target, sequence, state[0].unsqueeze(0), weights)
        z = F.linear(sequence, weights.w_ih, weights.b_ih)
        z = z + F.linear(states_before(state[0], outputs), weights.w_hh, weights.b_hh)
        return outputs, (final.squeeze(0),), {"z": z}

    def multipliers(r: StepValues, x: StepValues) -> StepValues:
        return {"dh_dz": secant(r["z"], x["z"])}

    def backward(
        multipliers: StepValues, grad: Tensor, grad_state: State, weights: Weights
    ) -> tuple[Tensor, State]:
        (grad_h,) = grad_state
        grad_z = torch.empty_like(grad)
        steps = zip(grad, multipliers["dh_dz"], grad_z, strict=True)
        for grad_t, dh_dz_t, grad_z_t in reversed(list(steps)):
            torch.mul(grad_h + grad_t, dh_dz_t, out=grad_z_t)
            grad_h = grad_z_t @ weights.w_hh
        return grad_z @ weights.w_ih, (grad_h,)

    return Cell(forward, multipliers, backward)


RNN_TANH = rnn(OPERATORS["rnn_tanh"], tanh_secant)
RNN_RELU = rnn(OPERATORS["rnn_relu"], relu_secant)
