"""LSTM, GRU and RNN: their gates' products and activations, walked back through time.

Every step is a chain of the other rules: secants for the gates (:mod:`.elementwise`), midpoints for
their products (:mod:`.products`), matrices for the rest. The slopes of a whole sequence are taken
at once; only the recursion itself runs step by step.

A cell is three pure functions over one layer and one direction, with time first:

    run(sequence, state, weights)           -> outputs, final state, trace
    slopes(trace_r, trace_x)                -> slopes of the gates at every step
    walk(slopes, grad, grad_state, weights) -> grad of sequence, grad of initial state

Cotangents may be stacked, one for each output of the model, before the rows: a step costs more than
its numbers, and so walks all of them at once.

A cell that the user's own loop steps, such as ``nn.LSTMCell``, is taken apart into these formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.rules.core.caching import cached, cached_between
from fxshap.rules.core.cancellation import extremes, sequential_factors
from fxshap.rules.core.dispatch import for_each_cotangent
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import RuleFn, Target, Tensors, decomposition, rule
from fxshap.rules.core.tracing import any_unless_tracing
from fxshap.rules.univariate import relu_slope, sigmoid_slope, tanh_slope

aten = torch.ops.aten
State = tuple[Tensor, ...]
Trace = dict[str, Tensor]
Run = tuple[list[Trace], Tensor, State]


class Weights(NamedTuple):
    """The weights of one layer in one direction; absent ones are ``None``."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None

    def present(self) -> list[Tensor]:
        """Return the weights there are, in torch's order."""
        return [weight for weight in self if weight is not None]


class Cell(NamedTuple):
    """A recurrent cell: how to run it, what its two ends fix, and how to walk it back."""

    run: Callable[[Tensor, State, Weights], tuple[Tensor, State, Trace]]
    slopes: Callable[[Trace, Trace], Trace]
    walk: Callable[[Trace, Tensor, State, Weights], tuple[Tensor, State]]


def mean(a: Tensor, b: Tensor) -> Tensor:
    """Midpoint of the two ends."""
    return (a + b) / 2


#: As :data:`.products.MIXED`; less, as what cancels comes by several paths through a cell and time.
HUGE = 1e2


def means(a_r: Tensor, b_r: Tensor, a_x: Tensor, b_x: Tensor) -> tuple[Tensor, Tensor]:
    """Midpoints of a gate `a` and what it lets through; one order counts where that is huge."""
    sums = a_r + a_x, b_r + b_x
    largest = torch.maximum(extremes(b_r)[1], extremes(b_x)[1])
    if any_unless_tracing(largest > HUGE):  # a gate is at most 1
        sums = sequential_factors((a_r, b_r), (a_x, b_x), sums, HUGE)
    return sums[0] / 2, sums[1] / 2


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Affine map of the last dimension."""
    return torch.nn.functional.linear(x, weight, bias)


def before(h0: Tensor, outputs: Tensor) -> Tensor:
    """Return the state that every step starts from."""
    return torch.cat([h0.unsqueeze(0), outputs[:-1]])


# --- LSTM (Hochreiter and Schmidhuber 1997) ---------------------------------------------------


def run_lstm(sequence: Tensor, state: State, weights: Weights) -> tuple[Tensor, State, Trace]:
    """i, f, o = s(z), g = tanh(z), c' = f c + i g, h = o tanh(c').

    torch's own kernel gives h; the gates follow from it at once, and only c step by step.
    """
    outputs, *final = aten.lstm.input(
        sequence, [s.unsqueeze(0) for s in state], weights.present(), weights.b_ih is not None,
        1, 0.0, False, False, False,
    )  # fmt: skip
    h0, c = state
    z = linear(sequence, weights.w_ih, weights.b_ih)
    z = z + linear(before(h0, outputs), weights.w_hh, weights.b_hh)
    i, f, g, o = z.chunk(4, -1)
    trace = {"i": i.sigmoid(), "f": f.sigmoid(), "g": g.tanh(), "o": o.sigmoid()}
    cells = [c]
    for forget, gain in zip(trace["f"], trace["i"] * trace["g"], strict=True):
        cells.append(torch.addcmul(gain, forget, cells[-1]))
    c = torch.stack(cells)
    trace |= {"before": c[:-1], "after": c[1:], "tanh": c[1:].tanh()}
    trace["logits"] = torch.cat([i, f, 2 * g, o], -1)  # tanh g = 2 s(2g) - 1
    return outputs, tuple(s.squeeze(0) for s in final), trace


def lstm_slopes(r: Trace, x: Trace) -> Trace:
    """How each gate's pre-activation moves c' (i, f, g) or h (o), h moves c', and c' the next."""
    to_i, to_f, to_2g, to_o = sigmoid_slope(r["logits"], x["logits"]).chunk(4, -1)
    i, g, o, y = (mean(r[name], x[name]) for name in ("i", "g", "o", "tanh"))
    f, c = means(r["f"], r["before"], x["f"], x["before"])
    return {
        "to_cell": (o * tanh_slope(r["after"], x["after"])).unsqueeze(-2),
        "from_cell": torch.stack([g * to_i, c * to_f, 4 * i * to_2g], -2),
        "from_output": (y * to_o).unsqueeze(-2),
        "forget": f.unsqueeze(-2),
    }


def walk_lstm(
    slopes: Trace, grad: Tensor, grad_state: State, weights: Weights
) -> tuple[Tensor, State]:
    """Walk an LSTM layer back through time; every tensor has a dimension for the gates."""
    grad_h, grad_c = (g.unsqueeze(-2) for g in grad_state)
    found = grad.new_empty(*grad.shape[:-1], 4, grad_c.shape[-1])
    to_gates = zip(found[..., :3, :], found[..., 3:, :], found.flatten(-2), strict=True)
    steps = zip(grad.unsqueeze(-2), *slopes.values(), to_gates, strict=True)
    for grad_t, to_cell, from_cell, from_output, forget, gates in reversed(list(steps)):
        through_cell, through_output, together = gates
        grad_h = grad_h + grad_t
        grad_y = grad_h if weights.w_hr is None else grad_h @ weights.w_hr
        grad_c = torch.addcmul(grad_c, grad_y, to_cell)
        torch.mul(grad_c, from_cell, out=through_cell)
        torch.mul(grad_y, from_output, out=through_output)
        grad_h = (together @ weights.w_hh).unsqueeze(-2)
        grad_c = grad_c * forget
    return found.flatten(-2) @ weights.w_ih, (grad_h.squeeze(-2), grad_c.squeeze(-2))


# --- GRU (Cho et al. 2014) --------------------------------------------------------------------


def run_gru(sequence: Tensor, state: State, weights: Weights) -> tuple[Tensor, State, Trace]:
    """a, z = s(.), n = tanh(input + a * hidden), h' = n + z (h - n)."""
    outputs, final = aten.gru.input(
        sequence, state[0].unsqueeze(0), weights.present(), weights.b_ih is not None,
        1, 0.0, False, False, False,
    )  # fmt: skip
    h = before(state[0], outputs)
    a_i, z_i, n_i = linear(sequence, weights.w_ih, weights.b_ih).chunk(3, -1)
    a_h, z_h, n_h = linear(h, weights.w_hh, weights.b_hh).chunk(3, -1)
    a = a_i + a_h
    trace = {"a": a, "z": z_i + z_h, "n": n_i + a.sigmoid() * n_h, "n_h": n_h, "h": h}
    return outputs, (final.squeeze(0),), trace


def gru_slopes(r: Trace, x: Trace) -> Trace:
    """How h' moves with the pre-activations, by way of the input and of h, and with h itself."""
    a, n_h = means(r["a"].sigmoid(), r["n_h"], x["a"].sigmoid(), x["n_h"])
    old_r, old_x = (end["h"] - end["n"].tanh() for end in (r, x))
    z, old = means(r["z"].sigmoid(), old_r, x["z"].sigmoid(), old_x)
    to_n = (1 - z) * tanh_slope(r["n"], x["n"])
    to_z = old * sigmoid_slope(r["z"], x["z"])
    to_a = to_n * n_h * sigmoid_slope(r["a"], x["a"])
    from_input, from_hidden = (torch.stack([to_a, to_z, n], -2) for n in (to_n, to_n * a))
    return {"from_input": from_input, "from_hidden": from_hidden, "keep": z}


def walk_gru(
    slopes: Trace, grad: Tensor, grad_state: State, weights: Weights
) -> tuple[Tensor, State]:
    """Walk a GRU layer back through time."""
    from_input, from_hidden, keep_h = slopes.values()
    (grad_h,) = grad_state
    found = grad.new_empty(*grad.shape[:-1], *from_input.shape[-2:])
    steps = zip(grad, from_input, from_hidden, keep_h, found, strict=True)
    for grad_t, from_input_t, from_hidden_t, keep_t, found_t in reversed(list(steps)):
        grad_h = (grad_h + grad_t).unsqueeze(-2)
        torch.mul(grad_h, from_input_t, out=found_t)
        through = (grad_h * from_hidden_t).flatten(-2) @ weights.w_hh
        grad_h = torch.addcmul(through, grad_h.squeeze(-2), keep_t)
    return found.flatten(-2) @ weights.w_ih, (grad_h,)


# --- RNN (Elman 1990) -------------------------------------------------------------------------


def plain_cell(target: Any, slope: Callable[..., Tensor]) -> Cell:
    """h' = activation(W x + U h)."""

    def run(sequence: Tensor, state: State, weights: Weights) -> tuple[Tensor, State, Trace]:
        outputs, final = target(
            sequence, state[0].unsqueeze(0), weights.present(), weights.b_ih is not None,
            1, 0.0, False, False, False,
        )  # fmt: skip
        z = linear(sequence, weights.w_ih, weights.b_ih)
        z = z + linear(before(state[0], outputs), weights.w_hh, weights.b_hh)
        return outputs, (final.squeeze(0),), {"z": z}

    def slopes(r: Trace, x: Trace) -> Trace:
        return {"z": slope(r["z"], x["z"])}

    def walk(
        slopes: Trace, grad: Tensor, grad_state: State, weights: Weights
    ) -> tuple[Tensor, State]:
        (grad_h,) = grad_state
        found = torch.empty_like(grad)
        steps = zip(grad, slopes["z"], found, strict=True)
        for grad_t, slope_t, found_t in reversed(list(steps)):
            torch.mul(grad_h + grad_t, slope_t, out=found_t)
            grad_h = found_t @ weights.w_hh
        return found @ weights.w_ih, (grad_h,)

    return Cell(run, slopes, walk)


# --- stacks of layers and directions ----------------------------------------------------------


def recurrent(target: Any, cell: Cell, states: int) -> RuleFn:
    """Declare a recurrent operation: layers and directions of one cell with `states` states."""

    @rule(target, name="recurrent", stacked=True)
    def walk_stack(
        operation: Operation, reference: Tensors, sample: Tensors, grad: Any
    ) -> tuple[Tensor | None, ...]:
        if any(slot > states for slot in operation.slots):  # a computed weight
            stacked = any(g is not None and g.dim() > 3 for g in grad)
            ask = partial(for_each_cotangent, generic) if stacked else generic
            return ask(operation, reference, sample, grad)
        layers = layer_weights(operation)
        reverse = (False, True) if operation["bidirectional"] else (False,)

        def run(end: Tensors) -> Run:
            return run_stack(cell, layers, reverse, *arguments(operation, end, states))

        traces_r = cached(reference[0], operation, lambda _: run(reference))
        traces_x = cached(sample[0], operation, lambda _: run(sample))

        def all_slopes() -> list[Trace]:
            return [cell.slopes(r, x) for r, x in zip(traces_r[0], traces_x[0], strict=True)]

        slopes = cached_between(operation, reference[0], sample[0], all_slopes)
        grad_out, *grad_states = grad
        stack = next(g.shape[:-3] for g in grad if g is not None)
        if grad_out is None:
            grad_out = traces_r[1].new_zeros(*stack, *traces_r[1].shape)
        elif operation["batch_first"]:
            grad_out = grad_out.transpose(-3, -2)
        # Time or layers first, then what is stacked, then rows.
        grad_out = grad_out.movedim(-3, 0)
        grad_last = [
            (final.new_zeros(*stack, *final.shape) if g is None else g).movedim(-3, 0)
            for g, final in zip(grad_states, traces_r[2], strict=True)
        ]
        grad_first = [torch.zeros_like(state) for state in grad_last]

        for layer in reversed(range(len(layers) // len(reverse))):
            pieces = grad_out.chunk(len(reverse), -1)
            grad_out = torch.zeros(())
            for direction, backwards in enumerate(reverse):
                index = layer * len(reverse) + direction
                piece = pieces[direction].flip(0) if backwards else pieces[direction]
                walked, firsts = cell.walk(
                    slopes[index], piece, tuple(state[index] for state in grad_last), layers[index]
                )
                grad_out = grad_out + (walked.flip(0) if backwards else walked)
                for whole, first in zip(grad_first, firsts, strict=True):
                    whole[index] = first
        time = -2 if operation["batch_first"] else -3
        grads = [grad_out.movedim(0, time), *(first.movedim(0, -3) for first in grad_first)]
        return tuple(grads[slot] for slot in operation.slots)

    return walk_stack


def arguments(operation: Operation, end: Tensors, states: int) -> tuple[Tensor, State]:
    """Return the sequence, time first, and the initial states at one end.

    Constant ones are there for every row of the references, and the sample may be one row.
    """
    flat = list(operation.arguments)
    for slot, value in zip(operation.slots, end, strict=True):
        flat[slot] = value
    (sequence, initial, *_), _ = pytree.tree_unflatten(flat, operation.structure)
    sequence = sequence.transpose(0, 1) if operation["batch_first"] else sequence
    initial = tuple(initial) if states > 1 else (initial,)
    rows = end[0].shape[0 if operation["batch_first"] and operation.slots[0] == 0 else 1]
    return sequence[:, :rows], tuple(state[:, :rows] for state in initial)


def layer_weights(operation: Operation) -> list[Weights]:
    """Group the flat list of parameters by layer and direction."""
    params = operation["params"]
    directions = 2 if operation["bidirectional"] else 1
    size = len(params) // (operation["num_layers"] * directions)
    biased = operation["has_biases"]
    groups = [params[i : i + size] for i in range(0, len(params), size)]
    return [
        Weights(
            group[0],
            group[1],
            group[2] if biased else None,
            group[3] if biased else None,
            group[-1] if size in (3, 5) else None,
        )
        for group in groups
    ]


def run_stack(
    cell: Cell, layers: list[Weights], reverse: tuple[bool, ...], sequence: Tensor, state: State
) -> Run:
    """Run all layers; return their traces, the last outputs and the final states."""
    traces: list[Trace] = []
    finals: list[State] = []
    for layer in range(len(layers) // len(reverse)):
        outputs = []
        for direction, backwards in enumerate(reverse):
            index = layer * len(reverse) + direction
            initial = tuple(s[index] for s in state)
            steps = sequence.flip(0) if backwards else sequence
            out, final, trace = cell.run(steps, initial, layers[index])
            outputs.append(out.flip(0) if backwards else out)
            traces.append(trace)
            finals.append(final)
        sequence = torch.cat(outputs, -1)
    stacked = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    return traces, sequence, stacked


recurrent(aten.lstm.input, Cell(run_lstm, lstm_slopes, walk_lstm), states=2)
recurrent(aten.gru.input, Cell(run_gru, gru_slopes, walk_gru), states=1)
recurrent(aten.rnn_tanh.input, plain_cell(aten.rnn_tanh.input, tanh_slope), states=1)
recurrent(aten.rnn_relu.input, plain_cell(aten.rnn_relu.input, relu_slope), states=1)


# --- cells that the user's loop steps ---------------------------------------------------------


@decomposition(aten.lstm_cell.default)
def lstm_cell(
    input: Tensor,
    hx: list[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> State:
    """One step of :func:`run_lstm`."""
    h, c = hx
    i, f, g, o = (linear(input, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, -1)
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
    """One step of :func:`run_gru`."""
    a_i, z_i, n_i = linear(input, w_ih, b_ih).chunk(3, -1)
    a_h, z_h, n_h = linear(hx, w_hh, b_hh).chunk(3, -1)
    n = (n_i + (a_i + a_h).sigmoid() * n_h).tanh()
    return n + (z_i + z_h).sigmoid() * (hx - n)


def step_of(target: Target, activation: Callable[[Tensor], Tensor]) -> None:
    """Declare one step of :func:`plain_cell`."""

    @decomposition(target)
    def rnn_cell(
        input: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        return activation(linear(input, w_ih, b_ih) + linear(hx, w_hh, b_hh))


step_of(aten.rnn_tanh_cell.default, torch.tanh)
step_of(aten.rnn_relu_cell.default, torch.relu)
