"""Recurrent networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxshap.ops.recurrent import OPERATORS
from fxshap.testing.rule_check import ROWS, Case
from tests.rules.cases.base import constant, v

aten = torch.ops.aten


def recurrent(
    target: Any,
    gates: int,
    *,
    layers: int = 1,
    directions: int = 1,
    projection: int = 0,
    biases: bool = True,
    batch_first: bool = False,
    state: bool = False,
    lengths: bool = False,
    smoothed: bool = False,
    note: str = "",
) -> Case:
    """Return a case of recurrent layers over 5 steps of 3 features, with 4 hidden units."""
    two_states = target in (aten.lstm.input, OPERATORS["lstm"])
    features, hidden = 3, 4
    output = projection or hidden
    sizes = [features] + [output * directions] * (layers - 1)
    weights: list[Tensor] = []
    for size in (size for size in sizes for _ in range(directions)):
        shapes = [(gates * hidden, size), (gates * hidden, output)]
        shapes += [(gates * hidden,)] * 2 if biases else []
        shapes += [(projection, hidden)] if projection else []
        weights += [constant(*shape) for shape in shapes]
    count = layers * directions
    widths = (output, hidden) if two_states else (output,)
    states = [v(count, w, row=1) if state else torch.zeros(count, ROWS, w) for w in widths]
    sequence = v(5, features, row=0 if batch_first else 1)
    initial = states if two_states else states[0]
    options = (biases, layers, 0.0, False, directions == 2, batch_first)
    args = (sequence, initial, weights, *options)
    if lengths:
        args = (*args, torch.full((ROWS,), 3))
    kwargs = {"smoothed": True} if smoothed else {}
    output_row = 0 if batch_first else 1
    return Case(target, args, kwargs, output_row=output_row, state_row=1, note=note)


CELLS = [
    (aten.lstm.input, 4), (aten.gru.input, 3), (aten.rnn_tanh.input, 1), (aten.rnn_relu.input, 1),
]  # fmt: skip

RECURRENT = [
    *(
        recurrent(target, gates, note=note, **options)
        for target, gates in CELLS
        for note, options in {
            "": {},
            "batch first": {"batch_first": True},
            "without biases": {"biases": False},
            "bidirectional, stacked": {"layers": 2, "directions": 2},
            "of a computed state": {"layers": 2, "directions": 2, "state": True},
        }.items()
    ),
    *(
        recurrent(OPERATORS[name], gates, note=note, **options)
        for name, gates in {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}.items()
        for note, options in {
            "": {},
            "of 3 of 5 steps": {"lengths": True, "layers": 2, "directions": 2},
            "smoothed": {"smoothed": True},
            "smoothed, of 3 of 5 steps": {
                "smoothed": True, "lengths": True, "layers": 2, "directions": 2,
            },
            "smoothed, of a computed state": {
                "smoothed": True, "layers": 2, "directions": 2, "state": True, "batch_first": True,
            },
        }.items()
    ),
    recurrent(aten.lstm.input, 4, projection=2, note="projected"),
    recurrent(OPERATORS["lstm"], 4, projection=2, smoothed=True, note="smoothed, projected"),
    recurrent(aten.lstm.input, 4, projection=2, layers=2, directions=2, biases=False, state=True,
              batch_first=True, note="with everything"),
]  # fmt: skip
