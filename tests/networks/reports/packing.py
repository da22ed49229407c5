"""Recurrent models on packed sequences of different lengths."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

from tests.networks.reports.report import Report

report = partial(Report, family="packing", shapes=((4, 2),))


class Packed(nn.Module):
    """A recurrent layer on packed series, and a linear layer on what is read of it.

    Parameters
    ----------
    layer : type
        ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``.
    read : str
        ``"state"``, ``"cell"``, ``"mean"``, ``"largest"``, ``"last"`` or ``"data"``.
    length : int, optional
        The length of every row; by default they are an argument.
    is_sorted : bool
        Whether the lengths are promised to be sorted.
    total_length : int, optional
        As in ``pad_packed_sequence``.
    options
        Of the layer.
    """

    def __init__(
        self,
        layer: type[nn.RNNBase],
        read: str = "state",
        length: int | None = None,
        is_sorted: bool = False,
        total_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.layer = layer(2, 4, **options)
        self.read, self.length = read, length
        self.is_sorted, self.total_length = is_sorted, total_length
        width = 4 * (2 if self.layer.bidirectional else 1)
        states = self.layer.num_layers * width
        self.head = nn.Linear({"state": states, "cell": 2 * states}.get(read, width), 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Take series of shape (batch, steps, 2)."""
        if self.length is not None:
            lengths = torch.full((x.shape[0],), self.length)
        first = self.layer.batch_first
        x = x if first else x.transpose(0, 1)
        packed = pack_padded_sequence(x, lengths, first, self.is_sorted)
        outputs, states = self.layer(packed)
        if self.read in ("state", "cell"):
            parts = states if isinstance(states, tuple) else (states,)
            parts = parts if self.read == "cell" else parts[:1]
            return self.head(torch.cat([p.transpose(0, 1).flatten(1) for p in parts], 1))
        if self.read == "data":
            outputs = PackedSequence(outputs.data.relu(), *outputs[1:])
        padded, lengths = pad_packed_sequence(outputs, first, total_length=self.total_length)
        padded = padded if first else padded.transpose(0, 1)
        if self.read == "largest":
            return self.head(padded.max(1).values)
        if self.read == "last":
            return self.head(padded[:, -1])
        return self.head(padded.sum(1) / lengths.unsqueeze(1))


class ListOfSeries(nn.Module):
    """Series packed from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(2, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Take series of shape (batch, steps, 2)."""
        packed = pack_sequence([row[:3] for row in x], enforce_sorted=False)
        return self.head(self.layer(packed)[1][-1])


def packed(name: str, layer: type[nn.RNNBase], lengths: int | None = 3, **options: Any) -> Report:
    """Return a model whose lengths are bound, or constant if `lengths` is ``None``."""
    options = {"batch_first": True, **options}
    bound = {} if lengths is None else {"lengths": torch.tensor([lengths])}
    return report(
        name, architecture=partial(Packed, layer, **options), bound=bound, source="packed series"
    )


REPORTS = [
    packed("packed_lstm_state", nn.LSTM),
    packed("packed_gru_state", nn.GRU),
    packed("packed_rnn_state", nn.RNN),
    packed("packed_lstm_cell_stacked", nn.LSTM, read="cell", num_layers=2, bidirectional=True),
    packed("packed_lstm_mean", nn.LSTM, read="mean"),
    packed("packed_gru_mean_time_first", nn.GRU, read="mean", batch_first=False),
    packed("packed_lstm_largest", nn.LSTM, read="largest", bidirectional=True),
    packed("packed_gru_last", nn.GRU, read="last"),
    packed("packed_lstm_total_length", nn.LSTM, read="largest", total_length=4),
    packed("packed_lstm_data", nn.LSTM, read="data"),
    packed("packed_lstm_sorted", nn.LSTM, is_sorted=True),
    packed("packed_rnn_relu_mean", nn.RNN, read="mean", nonlinearity="relu", num_layers=2),
    packed("packed_lstm_constant", nn.LSTM, None, length=2, read="mean"),
    packed("packed_gru_constant_time_first", nn.GRU, None, length=4, batch_first=False),
    packed("packed_lstm_short", nn.LSTM, 1, read="mean", bidirectional=True),
    report("packed_list", architecture=ListOfSeries, source="packed series"),
]
