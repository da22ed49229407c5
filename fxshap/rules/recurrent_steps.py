"""Single steps of recurrent cells in a loop of the user's, such as ``nn.LSTMCell``.

They are decomposed into the formulas of one step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxshap.rules.core.registry import Target, decomposition
from fxshap.rules.recurrent_cells import State

aten = torch.ops.aten


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
