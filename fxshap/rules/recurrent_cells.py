"""LSTM, GRU and RNN cells over a sequence: forward pass, multipliers of the gates, backward pass.

Every step of a cell is a chain of other rules: secants for the activations (:mod:`.univariate`),
midpoints for the products of gates (:mod:`.products`), and matrices for the rest. The multipliers
of a whole sequence are computed at once; only the recursion of the backward pass runs step by step.

A cell is three pure functions of one layer in one direction, with the time in the first dimension:

    forward(sequence, state, weights)                  -> outputs, final state, activations
    multipliers(activations_r, activations_x, sums)    -> multipliers at every step
    backward(multipliers, grad, grad_state, weights)   -> grad of sequence, grad of initial state

Cotangents may be batched, one for each output of the model, in dimensions between the time and the
rows. Per-operation overhead dominates a step, so that all of them go backward together.

With the variance rule the gates have the multipliers S and T of :mod:`.smoothed_activations`. Their
sums are W x + U h, whose terms are the elements of x and h, so that with the squares of the weights

    v = W^2 dx^2 + U^2 dh^2,      grad_x = S g W + (T g W^2) dx

and likewise for h. The product of a gate, as f c, is one term of the sum that it is part of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxshap.ops.matrices import multiply_rows
from fxshap.ops.recurrent import OPERATORS
from fxshap.rules.core.cancellation import abs_aminmax, sequential_factors
from fxshap.rules.core.tracing import any_unless_tracing
from fxshap.rules.smoothed_activations import finite_change, smoothed_multipliers
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


class Sums(NamedTuple):
    """What changes in the sums W x + U h before the gates, for the variance rule.

    Attributes
    ----------
    input_change, state_change : Tensor
        x and h at the sample minus those at the reference, at every step.
    input_variance, state_variance : Tensor
        Those of W x and U h, with all gates in the last dimension.
    """

    input_change: Tensor
    state_change: Tensor
    input_variance: Tensor
    state_variance: Tensor

    @classmethod
    def between(cls, r: StepValues, x: StepValues, weights: Weights) -> Sums:
        """Return the sums of a layer, given its inputs and states at both endpoints."""
        inputs, states = (finite_change(r[name], x[name]) for name in ("inputs", "states"))
        of_inputs = F.linear(inputs.square(), weights.w_ih.square())
        of_states = F.linear(states.square(), weights.w_hh.square())
        return cls(inputs, states, of_inputs, of_states)

    @property
    def variance(self) -> Tensor:
        """The variance of W x + U h."""
        return self.input_variance + self.state_variance

    def changes(self) -> StepValues:
        """Return the changes, by the names that they have among the multipliers."""
        return {"input_change": self.input_change, "state_change": self.state_change}


class Cell(NamedTuple):
    """A recurrent cell, as three functions over a sequence; see the module.

    `carry` names the multiplier from the cell state to the next one, if there is a cell state.
    """

    forward: Callable[[Tensor, State, Weights], tuple[Tensor, State, StepValues]]
    multipliers: Callable[[StepValues, StepValues, Sums | None], StepValues]
    backward: Callable[[StepValues, Tensor, State, Weights], tuple[Tensor, State]]
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


def through_sums(grads: Tensor, weight: Tensor, change: Tensor | None) -> Tensor:
    """Return the cotangent of x for those of W x and, if its terms change, of its variance.

    Parameters
    ----------
    grads : Tensor
        Shape (..., 1 or 2, units).
    weight : Tensor
        W, of shape (units, inputs).
    change : Tensor, optional
        Shape (..., inputs).
    """
    of_mean, *of_variance = grads.unbind(-2)
    grad = multiply_rows(of_mean, weight)
    for g in of_variance:
        assert change is not None
        grad = torch.addcmul(grad, multiply_rows(g, weight.square()), change)
    return grad


def take_changes(
    multipliers: StepValues, batch_dims: int
) -> tuple[StepValues, list[Any], Tensor | None]:
    """Split the multipliers into those of the gates, and the changes of states and of inputs.

    The changes of inputs get `batch_dims` dimensions for batched cotangents after the time.
    """
    gates = dict(multipliers)
    inputs, states = gates.pop("input_change", None), gates.pop("state_change", None)
    steps = len(next(iter(gates.values())))
    if inputs is not None:
        inputs = inputs.reshape(steps, *[1] * batch_dims, *inputs.shape[1:])
    return gates, [None] * steps if states is None else list(states), inputs


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


def lstm_multipliers(r: StepValues, x: StepValues, sums: Sums | None) -> StepValues:
    """Return dh/dc', dc'/dz for the gates i, f and g, dh/dz for the gate o, and dc'/dc.

    Each is a product of secants and midpoints: di, df, d2g and do are the secants of the sigmoids,
    and the names of the formulas of :func:`lstm_forward` are midpoints. The last dimension but one
    is for the gates, and the one before it for the sums z and their variances. With the variance
    rule dh/dc' is for c' = f c + i g as a sum of two terms.
    """
    i, g, o, tanh_c = ((r[name] + x[name]) / 2 for name in ("i", "g", "o", "tanh_c_next"))
    f, c = gate_midpoints(r["f"], r["c"], x["f"], x["c"])
    dc_dz, dh_dz = [], []
    orders = slopes(sigmoid_secant, torch.sigmoid, r["z"], x["z"], gate_variance(sums))
    for order, slope in enumerate(orders, start=1):
        di, df, d2g, do = slope.chunk(4, -1)
        dc_dz.append(torch.stack([g * di, c * df, 2 * 2**order * i * d2g], -2))
        dh_dz.append((tanh_c * do).unsqueeze(-2))
    return {
        "dh_dc": (o.unsqueeze(-2) * cell_slopes(r, x, sums)).unsqueeze(-3),
        "dc_dz": torch.stack(dc_dz, -3),
        "dh_dz": torch.stack(dh_dz, -3),
        "dc_dc": f.unsqueeze(-2).unsqueeze(-2),
        **({} if sums is None else sums.changes()),
    }


def gate_variance(sums: Sums | None) -> Tensor | None:
    """Return the variances of z; that of the gate g is taken of 2g, as in `lstm_forward`."""
    if sums is None:
        return None
    i, f, g, o = sums.variance.chunk(4, -1)
    return torch.cat([i, f, 4 * g, o], -1)


def cell_slopes(r: StepValues, x: StepValues, sums: Sums | None) -> Tensor:
    """Return the slope of tanh c' for c', or for the terms of i, f and g: i g, f c and i g."""
    c_r, c_x = r["c_next"], x["c_next"]
    if sums is None:
        return tanh_secant(c_r, c_x).unsqueeze(-2)
    gain, carried = (finite_change(r[a] * r[b], x[a] * x[b]) for a, b in (("i", "g"), ("f", "c")))
    of_mean, of_variance = smoothed_multipliers(
        tanh_secant, torch.tanh, c_r, c_x, gain.square() + carried.square()
    )
    of_gain, of_carried = (torch.addcmul(of_mean, of_variance, term) for term in (gain, carried))
    return torch.stack([of_gain, of_carried, of_gain], -2)


def lstm_backward(
    multipliers: StepValues, grad: Tensor, grad_state: State, weights: Weights
) -> tuple[Tensor, State]:
    """Backward pass of an LSTM layer; see :func:`lstm_multipliers` for the last dimensions."""
    multipliers, state_changes, input_change = take_changes(multipliers, grad.dim() - 3)
    orders = multipliers["dc_dz"].shape[-3]
    carried = multipliers["dh_dc"].shape[-2] // 2  # the position of f, if dh/dc' is for each gate
    grad_h, grad_c = grad_state
    grad_c = grad_c.unsqueeze(-2).unsqueeze(-2)
    grad_z = grad.new_empty(*grad.shape[:-1], orders, 4, grad_c.shape[-1])
    gate_slices = zip(grad_z[..., :3, :], grad_z[..., 3:, :], grad_z.flatten(-2), strict=True)
    steps = zip(grad, *multipliers.values(), state_changes, gate_slices, strict=True)
    for grad_t, dh_dc, dc_dz, dh_dz, dc_dc, change, slices in reversed(list(steps)):
        grad_ifg, grad_o, all_gates = slices
        grad_y = grad_h + grad_t
        grad_y = grad_y if weights.w_hr is None else grad_y @ weights.w_hr
        grad_y = grad_y.unsqueeze(-2).unsqueeze(-2)
        grad_c = torch.addcmul(grad_c, grad_y, dh_dc)
        torch.mul(grad_c, dc_dz, out=grad_ifg)
        torch.mul(grad_y, dh_dz, out=grad_o)
        grad_h = through_sums(all_gates, weights.w_hh, change)
        grad_c = grad_c[..., carried, None, :] * dc_dc
    grad_sequence = through_sums(grad_z.flatten(-2), weights.w_ih, input_change)
    return grad_sequence, (grad_h, grad_c.squeeze(-2).squeeze(-2))


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


def gru_multipliers(r: StepValues, x: StepValues, sums: Sums | None) -> StepValues:
    """Return dh'/d(pre-activations), by way of the input and by way of h, and dh'/dh.

    The last dimension but one is for the gates a, z and n, and the one before it for their sums and
    the variances of these. The sum before n has a * hidden as one of its terms.
    """
    a, n_h = gate_midpoints(r["a"].sigmoid(), r["n_h"], x["a"].sigmoid(), x["n_h"])
    old_r, old_x = (values["h"] - values["n"].tanh() for values in (r, x))
    z, old = gate_midpoints(r["z"].sigmoid(), old_r, x["z"].sigmoid(), old_x)
    v_a, v_z, v_n, hidden = gru_variances(r, x, sums)
    to_n = slopes(tanh_secant, torch.tanh, r["n"], x["n"], v_n)
    to_z = slopes(sigmoid_secant, torch.sigmoid, r["z"], x["z"], v_z)
    to_a = slopes(sigmoid_secant, torch.sigmoid, r["a"], x["a"], v_a)
    to_hidden = to_n[0] if sums is None else torch.addcmul(to_n[0], to_n[1], hidden)
    dh_dhidden = (1 - z) * to_hidden
    by_input, by_state = [], []
    for order, (da, dz, dn) in enumerate(zip(to_a, to_z, to_n, strict=True)):
        gates = [dh_dhidden * n_h * da, old * dz]
        through_hidden = dh_dhidden * a if order == 0 else torch.zeros_like(a)
        by_input.append(torch.stack([*gates, (1 - z) * dn], -2))
        by_state.append(torch.stack([*gates, through_hidden], -2))
    return {
        "dh_dinput": torch.stack(by_input, -3),
        "dh_dhidden": torch.stack(by_state, -3),
        "dh_dh": z,
        **({} if sums is None else sums.changes()),
    }


def gru_variances(
    r: StepValues, x: StepValues, sums: Sums | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Return the variances of the sums before a, z and n, and the change of a * hidden."""
    hidden = finite_change(r["a"].sigmoid() * r["n_h"], x["a"].sigmoid() * x["n_h"])
    if sums is None:
        return None, None, None, hidden
    v_a, v_z, _ = sums.variance.chunk(3, -1)
    return v_a, v_z, sums.input_variance.chunk(3, -1)[2] + hidden.square(), hidden


def gru_backward(
    multipliers: StepValues, grad: Tensor, grad_state: State, weights: Weights
) -> tuple[Tensor, State]:
    """Backward pass of a GRU layer; see :func:`gru_multipliers` for the last dimensions."""
    multipliers, state_changes, input_change = take_changes(multipliers, grad.dim() - 3)
    dh_dinput, dh_dhidden, dh_dh = multipliers.values()
    (grad_h,) = grad_state
    grad_input = grad.new_empty(*grad.shape[:-1], *dh_dinput.shape[-3:])
    steps = zip(grad, dh_dinput, dh_dhidden, dh_dh, state_changes, grad_input, strict=True)
    for grad_t, dh_dinput_t, dh_dhidden_t, dh_dh_t, change, grad_input_t in reversed(list(steps)):
        grad_h = grad_h + grad_t
        of_gates = grad_h.unsqueeze(-2).unsqueeze(-2)
        torch.mul(of_gates, dh_dinput_t, out=grad_input_t)
        through_gates = through_sums((of_gates * dh_dhidden_t).flatten(-2), weights.w_hh, change)
        grad_h = torch.addcmul(through_gates, grad_h, dh_dh_t)
    return through_sums(grad_input.flatten(-2), weights.w_ih, input_change), (grad_h,)


GRU = Cell(gru_forward, gru_multipliers, gru_backward)

# --- RNN (Elman 1990) -------------------------------------------------------------------------


def rnn(target: Any, secant: Callable[..., Tensor], activation: Callable[[Tensor], Tensor]) -> Cell:
    """Return the cell h' = activation(W x + U h), given the kernel and its activation's secant."""

    def forward(
        sequence: Tensor, state: State, weights: Weights
    ) -> tuple[Tensor, State, StepValues]:
        outputs, final = run_layer(target, sequence, state[0].unsqueeze(0), weights)
        z = F.linear(sequence, weights.w_ih, weights.b_ih)
        z = z + F.linear(states_before(state[0], outputs), weights.w_hh, weights.b_hh)
        return outputs, (final.squeeze(0),), {"z": z}

    def multipliers(r: StepValues, x: StepValues, sums: Sums | None) -> StepValues:
        variance = None if sums is None else sums.variance
        orders = slopes(secant, activation, r["z"], x["z"], variance)
        return {"dh_dz": torch.stack(orders, -2), **({} if sums is None else sums.changes())}

    def backward(
        multipliers: StepValues, grad: Tensor, grad_state: State, weights: Weights
    ) -> tuple[Tensor, State]:
        multipliers, state_changes, input_change = take_changes(multipliers, grad.dim() - 3)
        (dh_dz,), (grad_h,) = multipliers.values(), grad_state
        grad_z = grad.new_empty(*grad.shape[:-1], *dh_dz.shape[-2:])
        steps = zip(grad, dh_dz, state_changes, grad_z, strict=True)
        for grad_t, dh_dz_t, change, grad_z_t in reversed(list(steps)):
            torch.mul((grad_h + grad_t).unsqueeze(-2), dh_dz_t, out=grad_z_t)
            grad_h = through_sums(grad_z_t, weights.w_hh, change)
        return through_sums(grad_z, weights.w_ih, input_change), (grad_h,)

    return Cell(forward, multipliers, backward)


RNN_TANH = rnn(OPERATORS["rnn_tanh"], tanh_secant, torch.tanh)
RNN_RELU = rnn(OPERATORS["rnn_relu"], relu_secant, torch.relu)
