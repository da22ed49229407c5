"""Recurrent layers, and their cells in a loop of the user's."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxshap
from fxshap.ops.recurrent import OPERATORS
from fxshap.rules import recurrent, recurrent_stack
from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.testing.rule_check import TOLERANCE
from tests.helpers import assert_exact
from tests.rules.helpers import FLOATS

aten = torch.ops.aten

LAYERS = {
    "LSTM": (nn.LSTM, nn.LSTMCell, {}),
    "LSTM without biases": (nn.LSTM, nn.LSTMCell, {"bias": False}),
    "GRU": (nn.GRU, nn.GRUCell, {}),
    "RNN": (nn.RNN, nn.RNNCell, {}),
    "RNN with relu": (nn.RNN, nn.RNNCell, {"nonlinearity": "relu"}),
}


class Layer(nn.Module):
    """A recurrent layer, and a linear layer for its last output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer, _, options = LAYERS[kind]
        self.layer = layer(3, 5, batch_first=True, **options)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Loop(Layer):
    """The same network, with its cell in a loop."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        _, cell, options = LAYERS[kind]
        self.cell = cell(3, 5, **options)
        for name, weight in self.layer.named_parameters():
            setattr(self.cell, name.removesuffix("_l0"), weight)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 5)
        memory = state
        for step in x.unbind(1):
            if isinstance(self.cell, nn.LSTMCell):
                state, memory = self.cell(step, (state, memory))
            else:
                state = self.cell(step, state)
        return self.head(state)


# Cells in a loop have other values with the variance rule: cells of an RNN carry the shift of the
# mean from step to step, and those of a GRU add n and z (h - n), taken for independent terms.
@pytest.mark.parametrize(
    "kind, rule", [*((kind, "rescale") for kind in LAYERS), ("LSTM", "variance")]
)
def test_cells_in_a_loop_have_the_attributions_of_their_layer(kind: str, rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    background, samples = (torch.randn(n, 6, 3, generator=generator).double() for n in (4, 2))
    layer, loop = Layer(kind).double(), Loop(kind).double()
    explainable = fxshap.make_explainable(layer, rule=rule)
    (expected,) = assert_exact(layer, explainable, [background], [samples], 1e-12)
    explainable = fxshap.make_explainable(loop, rule=rule)
    (found,) = assert_exact(loop, explainable, [background], [samples], 1e-12)
    assert abs(found - expected).max() <= 1e-14 * abs(expected).max() + 1e-16


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gates_of_huge_states_add_up(kind):
    """The parts of f c and of z (h - n) cancelled where a gate closes on a state of 1e30."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cell = getattr(nn, kind.upper())(3, 4).double()
    generator = torch.Generator().manual_seed(1)

    def end(size: float) -> list[Tensor]:
        shapes = [(2, 5, 3), (1, 5, 4), (1, 5, 4)][: 3 if kind == "lstm" else 2]
        drawn = [torch.randn(shape, generator=generator).double() * size for shape in shapes]
        return [drawn[0] / size * 30, *drawn[1:]]

    r, x = end(1e30), end(1.0)
    weights, options = [w.detach() for w in cell.parameters()], (True, 1, 0.0, False, False, False)
    hidden = (r[1:],) if kind == "lstm" else (r[1],)
    arguments = (r[0], *hidden, weights, *options)
    operation, _ = Operation.bind(
        getattr(aten, kind).input, arguments, slots=tuple(range(len(r))), rows=(1,) * (len(r) + 1)
    )
    before, after = operation(*r), operation(*x)
    grad = tuple(torch.ones_like(y) if k < 1 else None for k, y in enumerate(before))
    found = apply_rule(operation, r, x, grad)
    attributed = sum((m * (b - a)).sum() for m, a, b in zip(found, r, x, strict=True))
    change = (after[0] - before[0]).sum()
    assert attributed.item() == pytest.approx(change.item(), rel=1e-9)


@FLOATS
def test_a_gate_that_closes_on_a_large_state_adds_up(dtype):
    """The halves of z (h - n), by z and by h, cancelled: an error of 1e-3 in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cell = nn.GRU(3, 4)
    cell = cell.to(dtype)
    h_r = torch.tensor([[[0.0, 4.0, 9929.0, 0.0]]], dtype=dtype)
    h_x = torch.tensor([[[0.0, 4.0, 0.0, -1e-6]]], dtype=dtype)
    sequence = torch.zeros(2, 1, 3, dtype=dtype)
    weights, options = [w.detach() for w in cell.parameters()], (True, 1, 0.0, False, False, False)
    operation, _ = Operation.bind(
        aten.gru.input, (sequence, h_r, weights, *options), slots=(1,), rows=(1, 1, 1)
    )
    before, after = operation(h_r)[0], operation(h_x)[0]
    (m,) = apply_rule(operation, [h_r], [h_x], (torch.ones_like(before), None))
    attributed = (m.double() * (h_x.double() - h_r.double())).sum().item()
    change = (after.double() - before.double()).sum().item()
    assert attributed == pytest.approx(change, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])


# --- rows of different lengths --------------------------------------------------------------------

LENGTHS = torch.tensor([2, 5, 1])

VARIANTS = {
    "plain": {},
    "bidirectional, stacked": {"num_layers": 2, "bidirectional": True},
    "projected": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
}
#: Only an LSTM has projections.
KINDS_AND_VARIANTS = [
    (k, v) for k in OPERATORS for v in VARIANTS if v != "projected" or k == "lstm"
]


def recurrent_layer(kind: str, variant: str) -> nn.RNNBase:
    """A layer of 3 features, in float64."""
    options = VARIANTS[variant]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "rnn_relu":
            return nn.RNN(3, 4, nonlinearity="relu", **options).double()
        return {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}[kind](3, 4, **options).double()


def drawn(layer: nn.RNNBase, seed: int, steps: int = 5) -> list[Tensor]:
    """A sequence and initial states of three rows."""
    generator = torch.Generator().manual_seed(seed)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size]
    widths += [layer.hidden_size] if isinstance(layer, nn.LSTM) else []
    shapes = [(steps, 3, 3), *((count, 3, width) for width in widths)]
    return [torch.randn(shape, generator=generator).double() for shape in shapes]


def bound_operation(kind: str, layer: nn.RNNBase, tensors: list[Tensor], lengths: Tensor | None):
    states = tensors[1:] if kind == "lstm" else tensors[1]
    weights = [weight.detach() for weight in layer.parameters()]
    options = (True, layer.num_layers, 0.0, False, layer.bidirectional, False, lengths)
    return Operation.bind(
        OPERATORS[kind],
        (tensors[0], states, weights, *options),
        slots=tuple(range(len(tensors))),
        rows=(1,) * (2 * len(tensors)),
    )[0]


def row_of(tensors: list[Tensor], row: int, steps: int) -> list[Tensor]:
    """One row of a sequence of its own length, and of states."""
    sequence, *states = (x[:, row : row + 1] for x in tensors)
    return [sequence[:steps], *states]


@pytest.mark.parametrize(("kind", "variant"), KINDS_AND_VARIANTS)
def test_rows_of_different_lengths_are_computed_as_each_row_by_itself(kind, variant):
    layer = recurrent_layer(kind, variant)
    r, x = drawn(layer, 1), drawn(layer, 2)
    operation = bound_operation(kind, layer, r, LENGTHS)
    outputs = operation(*r)
    generator = torch.Generator().manual_seed(3)
    grad = [torch.randn(y.shape, generator=generator).double() for y in outputs]
    found = apply_rule(operation, r, x, tuple(grad))
    for row, steps in enumerate(LENGTHS.tolist()):
        r_row, x_row = row_of(r, row, steps), row_of(x, row, steps)
        by_itself = bound_operation(kind, layer, r_row, None)
        own_outputs = row_of(list(outputs), row, steps)
        for y, expected in zip(own_outputs, by_itself(*r_row), strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
        assert (outputs[0][steps:, row] == 0).all()
        m = apply_rule(by_itself, r_row, x_row, tuple(row_of(grad, row, steps)))
        for y, expected in zip(row_of(list(found), row, steps), m, strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
        assert (found[0][steps:, row] == 0).all()


@pytest.mark.parametrize("kind", OPERATORS)
def test_padding_of_any_value_changes_nothing(kind):
    layer = recurrent_layer(kind, "bidirectional, stacked")
    r, x = drawn(layer, 1), drawn(layer, 2)
    grad = tuple(torch.ones_like(y) for y in bound_operation(kind, layer, r, LENGTHS)(*r))

    def multipliers(padding: float) -> tuple[Tensor | None, ...]:
        padded = [[tensors[0].clone(), *tensors[1:]] for tensors in (r, x)]
        for sequence, *_ in padded:
            sequence[torch.arange(5).unsqueeze(1) >= LENGTHS] = padding
        operation = bound_operation(kind, layer, padded[0], LENGTHS)
        return apply_rule(operation, *padded, grad)

    for m, same in zip(multipliers(0.0), multipliers(1e6), strict=True):
        assert torch.equal(m, same)


@pytest.mark.parametrize("kind", OPERATORS)
def test_weights_that_vary_add_up_over_rows_of_different_lengths(kind):
    layer = recurrent_layer(kind, "plain")
    r = drawn(layer, 1)
    weights = [weight.detach() for weight in layer.parameters()]
    changed = [weight * 1.1 for weight in weights]
    states = r[1:] if kind == "lstm" else r[1]
    arguments = (r[0], states, weights, True, 1, 0.0, False, False, False, LENGTHS)
    operation, _ = Operation.bind(OPERATORS[kind], arguments, slots=(len(r),), rows=(None, 1, 1, 1))
    before, after = operation(weights[0]), operation(changed[0])
    grad = tuple(torch.ones_like(y) for y in before)
    (m,) = apply_rule(operation, [weights[0]], [changed[0]], grad)
    attributed = (m * (changed[0] - weights[0])).sum()
    change = sum((a - b).sum() for a, b in zip(after, before, strict=True))
    assert attributed.item() == pytest.approx(change.item(), rel=1e-10)


# --- several samples, each with several references ------------------------------------------------


@pytest.mark.parametrize("elements", [1, 2**16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("kind", "variant"), KINDS_AND_VARIANTS)
def test_samples_with_references_are_computed_as_each_pair(
    kind, variant, shared, elements, monkeypatch
):
    """Three samples with three references each, and two cotangents, in parts and blocks.

    Samples of different lengths do not share the activations of their references.
    """
    blocks = ContextVar("elements", default=elements)
    monkeypatch.setattr(recurrent_stack, "BLOCK_ELEMENTS", blocks)
    layer = recurrent_layer(kind, variant)
    r, x = [torch.cat([t] * 3, 1) for t in drawn(layer, 1)], drawn(layer, 2)
    if not shared:
        r = [t + torch.arange(9).reshape(1, 9, 1) / 9 for t in r]
    lengths = None if shared else LENGTHS.repeat_interleave(3)
    operation = replace(bound_operation(kind, layer, r, lengths), name="layer")
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, *y.shape) for y in operation(*r)]
    grad = tuple(torch.randn(shape, generator=generator).double() for shape in shapes)
    found = apply_rule(operation, r, x, grad)
    repeated = [t.repeat_interleave(3, 1) for t in x]
    for k in range(2):
        by_pair = apply_rule(
            bound_operation(kind, layer, r, lengths), r, repeated, tuple(g[k] for g in grad)
        )
        for m, expected in zip(found, by_pair, strict=True):
            torch.testing.assert_close(m[k], expected, rtol=1e-12, atol=1e-14)


def test_activations_of_references_that_all_samples_share_are_computed_once(monkeypatch):
    rows = []
    forward = recurrent.stack_forward
    monkeypatch.setattr(
        recurrent,
        "stack_forward",
        lambda stack, steps, *rest: (rows.append(steps.shape[1]), forward(stack, steps, *rest))[1],
    )
    torch.manual_seed(0)
    background, samples = torch.randn(4, 5, 3), torch.randn(6, 5, 3)
    fxshap.DeepExplainer(Layer("LSTM"), background, batch_size=3).shap_values(samples)
    assert rows == [4, 3, 3]
