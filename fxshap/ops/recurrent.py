"""Recurrent layers as one operator each, over sequences of one length or of different lengths.

``fxshap::lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu`` take the arguments of torch's operators of
these names, and ``lengths``: the number of steps of every row. What follows the last step of a row
is padding: the outputs there are 0, and the final states are those of the last step. ``smoothed``
chooses the rule and changes nothing else.

torch infers the outputs of its own operators by running every step on fake tensors, which takes
minutes for 300 steps. These have shapes that are known in advance. Packed sequences become padded
ones, because the data of packed sequences has no dimension for the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fxshap.ops.library import LIBRARY

#: torch's functions, by the name of the operator.
KERNELS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "rnn_tanh": torch.rnn_tanh,
    "rnn_relu": torch.rnn_relu,
}

#: The initial states of an operator: an LSTM has two.
States = Tensor | Sequence[Tensor]


def recurrent(
    kernel: Callable[..., tuple[Tensor, ...]],
    input: Tensor,
    hx: States,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None = None,
    smoothed: bool = False,
) -> tuple[Tensor, ...]:
    """Run recurrent layers by torch's kernel; autograd can differentiate it.

    Parameters
    ----------
    kernel : callable
        One of :data:`KERNELS`.
    input : Tensor
        Shape (steps, rows, features), or (rows, steps, features) if `batch_first` is set.
    hx : Tensor or sequence of Tensor
        The initial states, of shape (layers, rows, features).
    lengths : Tensor, optional
        The number of steps of every row, at least 1; by default all.
    smoothed : bool
        For the rule only: whether it uses the variances of the sums before the gates.

    Returns
    -------
    tuple of Tensor
        The outputs, and the final states.
    """
    options = (list(params), has_biases, num_layers, dropout, train, bidirectional)
    if lengths is None:
        return kernel(input, hx, *options, batch_first)
    steps = input.shape[1 if batch_first else 0]
    packed = pack_padded_sequence(input, lengths.cpu(), batch_first, enforce_sorted=False)
    before, after = packed.sorted_indices, packed.unsorted_indices
    assert before is not None and after is not None  # without `enforce_sorted`
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    first, *rest = (state.index_select(1, before) for state in states)
    data, *finals = kernel(
        packed.data, packed.batch_sizes, [first, *rest] if rest else first, *options
    )
    outputs, _ = pad_packed_sequence(packed._replace(data=data), batch_first, total_length=steps)
    return outputs, *(state.index_select(1, after) for state in finals)


def recurrent_shapes(
    input: Tensor,
    hx: States,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None = None,
    smoothed: bool = False,
) -> tuple[Tensor, ...]:
    """Return empty tensors like the outputs of :func:`recurrent`, for fake tensors."""
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    steps, rows = input.shape[:2][:: -1 if batch_first else 1]
    outputs = input.new_empty(steps, rows, width)
    return outputs.transpose(0, 1) if batch_first else outputs, *map(torch.empty_like, states)


for _name, _kernel in KERNELS.items():
    _states, _finals = (
        ("Tensor[] hx", "Tensor, Tensor") if _name == "lstm" else ("Tensor hx", "Tensor")
    )
    LIBRARY.define(
        f"{_name}(Tensor input, {_states}, Tensor[] params, bool has_biases, int num_layers,"
        " float dropout, bool train, bool bidirectional, bool batch_first, Tensor? lengths=None,"
        " bool smoothed=False)"
        f" -> (Tensor, {_finals})"
    )
    LIBRARY.impl(_name, partial(recurrent, _kernel), "CompositeExplicitAutograd")
    LIBRARY.impl(_name, recurrent_shapes, "Meta")

#: The operators, by name.
OPERATORS = {name: getattr(torch.ops.fxshap, name).default for name in KERNELS}
