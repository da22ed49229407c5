"""The GRU cell (Cho et al. 2014).

a, z = s(.), n = tanh(input + a * hidden), h' = n + z (h - n), where `a` is the reset gate and `z`
the update gate.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxshap.ops.recurrent import OPERATORS
from fxshap.rules.recurrent_cells import (
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
from fxshap.rules.smoothed_activations import finite_change
from fxshap.rules.univariate import sigmoid_secant, tanh_secant


def gru_forward(
    sequence: Tensor, state: State, weights: Weights, smoothed: bool
) -> tuple[Tensor, State, StepValues]:
    """Run torch's own kernel; the activations are the sums before the gates, n_h and h."""
    outputs, final = run_layer(OPERATORS["gru"], sequence, state[0].unsqueeze(0), weights)
    h = states_before(state[0], outputs)
    a_i, z_i, n_i = F.linear(sequence, weights.w_ih, weights.b_ih).chunk(3, -1)
    a_h, z_h, n_h = F.linear(h, weights.w_hh, weights.b_hh).chunk(3, -1)
    a = a_i + a_h
    activations = {"a": a, "z": z_i + z_h, "n": n_i + a.sigmoid() * n_h, "n_h": n_h, "h": h}
    return outputs, (final.squeeze(0),), activations


def gru_multipliers(r: StepValues, x: StepValues, sums: Sums | None) -> StepValues:
    """Return dh'/d(sums) and dh'/dh.

    The last dimension but one is for the sums before a and z, the input of n and the `hidden` of n,
    and the one before it for the sums and their variances. The sum before n has a * hidden as one
    of its terms.
    """
    a, n_h = gate_midpoints(r["a"].sigmoid(), r["n_h"], x["a"].sigmoid(), x["n_h"])
    old_r, old_x = (values["h"] - values["n"].tanh() for values in (r, x))
    z, old = gate_midpoints(r["z"].sigmoid(), old_r, x["z"].sigmoid(), old_x)
    v_a, v_z, v_n, hidden = gru_variances(r, x, sums)
    to_n = slopes(tanh_secant, torch.tanh, r["n"], x["n"], v_n)
    to_z = slopes(sigmoid_secant, torch.sigmoid, r["z"], x["z"], v_z)
    to_a = slopes(sigmoid_secant, torch.sigmoid, r["a"], x["a"], v_a)
    to_hidden = to_n[0] if hidden is None else torch.addcmul(to_n[0], to_n[1], hidden)
    dh_dhidden = (1 - z) * to_hidden
    dh_dsums = []
    for order, (da, dz, dn) in enumerate(zip(to_a, to_z, to_n, strict=True)):
        through_hidden = dh_dhidden * a if order == 0 else torch.zeros_like(a)
        gates = [dh_dhidden * n_h * da, old * dz, (1 - z) * dn, through_hidden]
        dh_dsums.append(torch.stack(gates, -2))
    return {
        "dh_dsums": torch.stack(dh_dsums, -3),
        "dh_dh": z,
        **({} if sums is None else {"change": sums.change}),
    }


def gru_variances(
    r: StepValues, x: StepValues, sums: Sums | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the variances of the sums before a, z and n, and the change of a * hidden."""
    if sums is None:
        return None, None, None, None
    hidden = finite_change(r["a"].sigmoid() * r["n_h"], x["a"].sigmoid() * x["n_h"])
    v_a, v_z, _ = sums.variance.chunk(3, -1)
    return v_a, v_z, sums.input_variance.chunk(3, -1)[2] + hidden.square(), hidden


def gru_backward(
    blocks: Iterable[StepValues], grad: Tensor, grad_state: State, weights: Weights
) -> tuple[Tensor, State]:
    """Backward pass of a GRU layer; see :func:`gru_multipliers` for the last dimensions."""
    of_states, of_hidden = weights.w_hh.tensor_split([2 * weights.w_hh.shape[1]])
    no_states, no_inputs = torch.zeros_like(of_hidden), torch.zeros_like(weights.w_ih[::3])
    sums = GateSums(
        torch.cat([of_states, no_states, of_hidden]), torch.cat([weights.w_ih, no_inputs])
    )
    (grad_h,) = grad_state
    grad_sequence = []
    for grad_t, step in steps_backward(blocks, grad):
        grad_h = grad_h + grad_t
        grad_sums = grad_h.unsqueeze(-2).unsqueeze(-2) * step["dh_dsums"]
        through_gates, grad_input = sums.backward(grad_sums.flatten(-2), step.get("change"))
        grad_h = torch.addcmul(through_gates, grad_h, step["dh_dh"])
        grad_sequence.append(grad_input)
    return torch.stack(grad_sequence[::-1]), (grad_h,)


GRU = Cell(gru_forward, gru_multipliers, gru_backward)
