"""The LSTM cell (Hochreiter and Schmidhuber 1997).

i, f, o = s(z) with the logistic function s, g = tanh(z), c' = f c + i g, h = o tanh(c').

All five nonlinearities are logistic: tanh z = 2 s(2z) - 1. They are therefore stored together, in
the last dimension but one and in the order i, f, g, o, c'. Their secant is

    (s(x) - s(r)) / (x - r) = max(s(x), s(r)) max(s(-x), s(-r)) (1 - e^-|x - r|) / |x - r|

in which nothing cancels, and s is computed once for each endpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxshap.ops.recurrent import OPERATORS
from fxshap.rules.core.cancellation import sequential_factors
from fxshap.rules.core.tracing import any_unless_tracing
from fxshap.rules.recurrent_cells import (
    MAX_MIXED_RATIO,
    Cell,
    GateSums,
    State,
    StepValues,
    Sums,
    Weights,
    gate_midpoints,
    run_layer,
    slopes,
    states_before,
    steps_backward,
)
from fxshap.rules.smoothed_activations import finite_change, smoothed_multipliers
from fxshap.rules.univariate import mean_decay, sigmoid_secant, tanh_secant


def lstm_forward(
    sequence: Tensor, state: State, weights: Weights, smoothed: bool
) -> tuple[Tensor, State, StepValues]:
    """Run torch's own kernel, which gives h.

    The gates of all steps follow from h at once, and only c needs a loop over the steps.
    """
    outputs, *final = run_layer(
        OPERATORS["lstm"], sequence, [s.unsqueeze(0) for s in state], weights
    )
    h0, c = state
    z = F.linear(sequence, weights.w_ih, weights.b_ih)
    z = z + F.linear(states_before(h0, outputs), weights.w_hh, weights.b_hh)
    i, f, g, o = z.chunk(4, -1)
    gates = {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
    cells = [c]
    for forget, gain in zip(gates["f"], gates["i"] * gates["g"], strict=True):
        cells.append(torch.addcmul(gain, forget, cells[-1]))
    c = torch.stack(cells)
    values = {**gates, "c": c[:-1], "c_next": c[1:], "tanh_c_next": c[1:].tanh()}
    if smoothed:
        values["z"] = torch.cat([i, f, 2 * g, o], -1)  # tanh g = 2 s(2g) - 1
    else:
        values = endpoint_terms(values, [i, f, 2 * g, o, 2 * c[1:]])
    return outputs, tuple(s.squeeze(0) for s in final), values


def endpoint_terms(values: StepValues, arguments: list[Tensor]) -> StepValues:
    """Return what the multipliers need of one endpoint.

    Parameters
    ----------
    values : dict
        The gates and the cell states.
    arguments : list of Tensor
        Those of the five logistic functions.

    Returns
    -------
    dict
        The arguments z, s(z) and s(-z), and the factors that :func:`lstm_multipliers` adds
        up, each of shape (steps, rows, 5 or 6, units); and the largest |c| of every step and row.
    """
    argument = torch.stack(arguments, -2)
    factors = [
        values["g"] / 2, values["c"] / 2, 2 * values["i"], values["tanh_c_next"] / 2,
        2 * values["o"], values["f"] / 2,
    ]  # fmt: skip
    largest = values["c"].abs().amax(-1)
    return {
        "argument": argument,
        "logistic": argument.sigmoid(),
        "complement": (-argument).sigmoid_(),
        "factors": torch.stack(factors, -2),
        "largest": largest,
    }


def lstm_multipliers(r: StepValues, x: StepValues, sums: Sums | None) -> StepValues:
    """Return dh/dc', dc'/dz for the gates i, f and g, dh/dz for the gate o, and dc'/dc.

    Each is a secant times the midpoint of what the gate multiplies: g di, c df, i dg, tanh(c') do
    and o dtanh(c'), and the midpoint of f. The last dimension but one is for the gates, and the one
    before it for the sums z and their variances.
    """
    if sums is not None:
        return smoothed_multipliers_of_lstm(r, x, sums)
    secants = mean_decay(r["argument"], x["argument"])
    for name in ("logistic", "complement"):
        secants.mul_(torch.maximum(x[name], r[name]))
    factors = x["factors"] + r["factors"]
    largest = torch.maximum(x["largest"].amax(), r["largest"].amax())
    if any_unless_tracing(largest > MAX_MIXED_RATIO):
        f_r, f_x = (2 * values["factors"][..., 5, :] for values in (r, x))
        c_r, c_x = (2 * values["factors"][..., 1, :] for values in (r, x))
        f, c = sequential_factors((f_r, c_r), (f_x, c_x), (f_r + f_x, c_r + c_x), MAX_MIXED_RATIO)
        factors[..., 5, :], factors[..., 1, :] = f / 2, c / 2
    factors[..., :5, :].mul_(secants)
    by_gate = factors.unsqueeze(-3)
    return {
        "dh_dc": by_gate[..., 4:5, :],
        "dc_dz": by_gate[..., :3, :],
        "dh_dz": by_gate[..., 3:4, :],
        "dc_dc": by_gate[..., 5:, :],
    }


def smoothed_multipliers_of_lstm(r: StepValues, x: StepValues, sums: Sums) -> StepValues:
    """Return the multipliers of :func:`lstm_multipliers` with the variance rule.

    There di, df, d2g and do are the multipliers of the sigmoids, and dh/dc' is for c' = f c + i g
    as a sum of two terms.
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
        "dh_dc": (o.unsqueeze(-2) * cell_slopes(r, x)).unsqueeze(-3),
        "dc_dz": torch.stack(dc_dz, -3),
        "dh_dz": torch.stack(dh_dz, -3),
        "dc_dc": f.unsqueeze(-2).unsqueeze(-2),
        "change": sums.change,
    }


def gate_variance(sums: Sums) -> Tensor:
    """Return the variances of z; that of the gate g is taken of 2g, as in `lstm_forward`."""
    i, f, g, o = sums.variance.chunk(4, -1)
    return torch.cat([i, f, 4 * g, o], -1)


def cell_slopes(r: StepValues, x: StepValues) -> Tensor:
    """Return the slope of tanh c' for the terms of i, f and g: i g, f c and i g."""
    gain, carried = (finite_change(r[a] * r[b], x[a] * x[b]) for a, b in (("i", "g"), ("f", "c")))
    of_mean, of_variance = smoothed_multipliers(
        tanh_secant, torch.tanh, r["c_next"], x["c_next"], gain.square() + carried.square()
    )
    of_gain, of_carried = (torch.addcmul(of_mean, of_variance, term) for term in (gain, carried))
    return torch.stack([of_gain, of_carried, of_gain], -2)


def lstm_backward(
    blocks: Iterable[StepValues], grad: Tensor, grad_state: State, weights: Weights
) -> tuple[Tensor, State]:
    """Backward pass of an LSTM layer; see :func:`lstm_multipliers` for the last dimensions."""
    sums = GateSums(weights.w_hh, weights.w_ih)
    grad_h, grad_c = grad_state
    grad_c = grad_c.unsqueeze(-2).unsqueeze(-2)
    grad_z = grad.new_empty(0)
    grad_sequence: list[Tensor] = []
    for grad_t, step in steps_backward(blocks, grad):
        dh_dc, dc_dz = step["dh_dc"], step["dc_dz"]
        if not grad_sequence:
            orders, carried = dc_dz.shape[-3], dh_dc.shape[-2] // 2  # the position of f, if any
            grad_z = grad.new_empty(*grad_h.shape[:-1], orders, 4, grad_c.shape[-1])
        grad_y = grad_h + grad_t
        grad_y = grad_y if weights.w_hr is None else grad_y @ weights.w_hr
        grad_y = grad_y.unsqueeze(-2).unsqueeze(-2)
        grad_c = torch.addcmul(grad_c, grad_y, dh_dc)
        torch.mul(grad_c, dc_dz, out=grad_z[..., :3, :])
        torch.mul(grad_y, step["dh_dz"], out=grad_z[..., 3:, :])
        grad_h, grad_input = sums.backward(grad_z.flatten(-2), step.get("change"))
        grad_c = grad_c[..., carried, None, :] * step["dc_dc"]
        grad_sequence.append(grad_input)
    return torch.stack(grad_sequence[::-1]), (grad_h, grad_c.squeeze(-2).squeeze(-2))


LSTM = Cell(lstm_forward, lstm_multipliers, lstm_backward, carry="dc_dc")
