"""What random networks are made of: every operation that has a rule, and ways of writing it.

A block is made once for a network, from options, and called with one or more tensors of shape
(rows, 12). Elementwise blocks run in any layout, those along the last dimension in most, the others
on the flat tensor only. What they return is flattened to (rows, anything).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxshap.ops.dtypes import differentiable
from fxshap.testing.rule_check import EACH, Case, Varying
from tests.rules.rule_cases import ALL, RECURRENT

#: Features of every value that one block hands to the next.
WIDTH = 12


@dataclass(frozen=True)
class Block:
    """One way of computing something.

    Attributes
    ----------
    make : callable
        ``make(**options)`` returns a function or a module of `arity` tensors.
    arity : int
        How many tensors it takes.
    layouts : tuple of str
        The layouts it can run in.
    options : dict of str to tuple
        What each option may be.
    fixes_rows : bool
        Whether it loops over the rows, so that a capture holds for one number of them.
    """

    make: Callable[..., Callable[..., Tensor]]
    arity: int = 1
    layouts: tuple[str, ...] = ("flat",)
    options: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    fixes_rows: bool = False


BLOCKS: dict[str, Block] = {}


def add(name: str, block: Block) -> None:
    assert name not in BLOCKS, name
    BLOCKS[name] = block


# --- layouts --------------------------------------------------------------------------------------


def wide(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda h: h.reshape(-1, *shape)


def flat(y: Tensor) -> Tensor:
    return y.reshape(-1, WIDTH)


#: How to enter each layout and how to leave it; `time_folded` is (T, B, C) as (T * B, C).
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "flat": (lambda h: h, lambda y: y),
    "tokens": (wide(3, 4), flat),
    "pairs": (wide(6, 2), flat),
    "image": (wide(3, 2, 2), flat),
    "channels_last": (
        lambda h: h.reshape(-1, 3, 2, 2).contiguous(memory_format=torch.channels_last), flat
    ),
    "time_first": (
        lambda h: h.reshape(-1, 3, 4).transpose(0, 1), lambda y: flat(y.transpose(0, 1))
    ),
    "time_folded": (
        lambda h: h.reshape(-1, 3, 4).transpose(0, 1).reshape(-1, 4),
        lambda y: flat(y.reshape(3, -1, 4).transpose(0, 1)),
    ),
    "rows_folded": (lambda h: h.reshape(-1, 4), flat),
    "strided": (
        lambda h: h.reshape(-1, 4, 3).transpose(1, 2), lambda y: flat(y.transpose(1, 2))
    ),
    "single": (wide(WIDTH, 1), flat),
    "rows_last": (lambda h: h.T, lambda y: y.T),
    "one_dimension": (lambda h: h.flatten(), flat),
}  # fmt: skip

ANY_LAYOUT = tuple(LAYOUTS)
ALONG_LAST = tuple(name for name in LAYOUTS if name not in ("rows_last", "one_dimension"))


def fixed(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return partial(function, **options)


def elementwise(name: str, function: Callable[..., Tensor], arity: int = 1, **options: Any) -> None:
    """Declare a function of every element by itself."""
    add(name, Block(partial(fixed, function), arity, ANY_LAYOUT, options))


def along_last(name: str, function: Callable[..., Tensor], arity: int = 1, **options: Any) -> None:
    """Declare a function along the last dimension, of (..., features) and any size."""
    add(name, Block(partial(fixed, function), arity, ALONG_LAST, options))


def whole(name: str, function: Callable[..., Tensor], arity: int = 1, **options: Any) -> None:
    """Declare a function of (rows, 12)."""
    add(name, Block(partial(fixed, function), arity, options=options))


def module(name: str, arity: int = 1, **options: Any) -> Callable[[Any], Any]:
    """Declare the decorated maker of a function or module of (rows, 12)."""

    def declare(make: Any) -> Any:
        add(name, Block(make, arity, options=options))
        return make

    return declare


class Chain(nn.Module):
    """Modules and functions, one after another."""

    def __init__(self, *parts: Callable[..., Tensor]) -> None:
        super().__init__()
        self.modules_among = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.parts = parts

    def forward(self, *values: Tensor) -> Tensor:
        first, *rest = self.parts
        y = first(*values)
        for part in rest:
            y = part(y)
        return y


# --- every case of a rule -------------------------------------------------------------------------

HOW = ("smoothly", "clamped")
CASES: dict[str, list[Case]] = defaultdict(list)
for case in ALL:
    # Initial states that do not vary are there for the cases' own number of rows.
    if len(case.varying) > 1 or not any(case is other for other in RECURRENT):
        CASES[f"op {case}"].append(case)


def into(value: Tensor, low: float, high: float, how: str) -> Tensor:
    """Bring values into an interval, smoothly or with a kink at its ends."""
    if math.isinf(low) and math.isinf(high):
        return value
    if how == "clamped":
        return value.clamp(*(None if math.isinf(end) else end for end in (low, high)))
    if math.isinf(high):
        return low + F.softplus(value)
    if math.isinf(low):
        return high - F.softplus(value)
    return low + (high - low) * value.sigmoid()


def call(case: Case, values: list[Tensor]) -> Any:
    """Run the operation of a case at these values of its varying arguments."""
    flat_arguments, structure = pytree.tree_flatten((case.args, case.kwargs))
    waiting = iter(values)
    given = [next(waiting) if isinstance(a, Varying) else a for a in flat_arguments]
    args, kwargs = pytree.tree_unflatten(given, structure)
    return case.target(*args, **kwargs)


def curve(h: Tensor, name: str, variant: int, how: str) -> Tensor:
    """A univariate function at every element, in its domain."""
    case = CASES[name][variant]
    (varying,) = case.varying
    return call(case, [into(h, varying.low, varying.high, how)])


class FromCase(nn.Module):
    """The operation of a case, its varying arguments computed by linear layers."""

    def __init__(self, name: str, variant: int, how: str) -> None:
        super().__init__()
        self.case, self.how = CASES[name][variant], how
        self.sources = nn.ModuleList(
            nn.Linear(WIDTH, math.prod(varying.shape)) for varying in self.case.varying
        )

    def argument(self, varying: Varying, value: Tensor) -> Tensor:
        value = into(value.reshape(-1, *varying.shape), varying.low, varying.high, self.how)
        if varying.indices == 2:
            value = value > 0
        elif varying.indices:
            value = (value.abs() * 1e3).long() % varying.indices
        if varying.masked:
            value = value.masked_fill(torch.arange(varying.shape[-1]) == 1, -math.inf)
        return value.movedim(0, varying.row) if varying.row else value

    def forward(self, h: Tensor) -> Tensor:
        case = self.case
        values = [self.argument(v, s(h)) for v, s in zip(case.varying, self.sources, strict=True)]
        if case.output_row is None:
            results = [call(case, [value[row] for value in values]) for row in range(len(h))]
            return torch.stack([joined(result, None, None) for result in results])
        y = joined(call(case, values), max(case.output_row, 0), case.state_row)
        if "log_softmax" in str(case) and case.varying[0].masked:  # without what is at -inf
            y = y.reshape(-1, 5, 6)
            y = torch.cat([y[..., :1], y[..., 2:]], -1).flatten(1)
        return y


def joined(result: Any, row: int | None, state_row: int | None) -> Tensor:
    """Join the floating-point outputs to (rows, anything), or to one dimension for one row."""
    outputs = [result] if isinstance(result, Tensor) else list(result)
    rows = [row] + [state_row] * (len(outputs) - 1)
    kept = [
        y.flatten() if r is None else y.movedim(r, 0).reshape(y.shape[r], -1)
        for y, r in zip(outputs, rows, strict=True)
        if differentiable(y)
    ]
    return torch.cat(kept, -1)


for name, cases in CASES.items():
    variants = {"variant": tuple(range(len(cases))), "how": HOW}
    constants = pytree.tree_leaves((cases[0].args, cases[0].kwargs))
    if cases[0].output_row is EACH and not any(isinstance(c, Tensor) for c in constants):
        elementwise(name, partial(curve, name=name), **variants)
    else:
        looped = any(case.output_row is None for case in cases)
        add(name, Block(partial(FromCase, name), options=variants, fixes_rows=looped))

# --- activations as people write them -------------------------------------------------------------

elementwise("gelu by erf", lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))))
elementwise("gelu by sigmoid", lambda h: h * torch.sigmoid(1.702 * h))
elementwise(
    "gelu by tanh",
    lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h.pow(3)))),
)
elementwise("relu in place", lambda h: F.relu(h.clone(), inplace=True))
elementwise("leaky by where", lambda h: torch.where(h > 0, h, 0.2 * h))
elementwise("relu by product", lambda h: h * (h > 0))
elementwise("relu by mask", lambda h: h.masked_fill(h < 0, 0.0))
elementwise("assigned by mask", lambda h: written(h.clone(), h < 0.5, 0.25))
elementwise("updated by mask", lambda h: updated(h.clone(), h > 0.5))
elementwise("sigmoid by exp", lambda h: 1 / (1 + torch.exp(-h)))
elementwise("softsign", lambda h: h / (1 + h.abs()))
elementwise("hardtanh by clamp_", lambda h: h.clone().clamp_(-1, 1))
elementwise("log modulus", lambda h: h.sign() * h.abs().log1p())
elementwise("polynomial", lambda h: h - h**3 / 6 + h**5 / 120)
elementwise("gaussian", lambda h: torch.exp(-h.square()))
elementwise("constant", lambda h: torch.ones_like(h) * 0.5)
elementwise("identity", lambda h: h)
elementwise("scaled", lambda h, by: h * by, by=(-1.0, 0.5, 2.0, 1e-3, 0.0))
elementwise("shifted", lambda h, by: h + by, by=(-1.0, 0.5, 1e3))
elementwise("detached", lambda h: h.detach() + h)
elementwise("quantised", lambda h: torch.round(h * 2) / 2)
elementwise("truncated", lambda h: h.long().to(h.dtype) + 0.1 * h)


def written(h: Tensor, mask: Tensor, value: float) -> Tensor:
    h[mask] = value
    return h


def updated(h: Tensor, mask: Tensor) -> Tensor:
    h[mask] *= 0.5
    h[h < 0] = torch.expm1(h[h < 0])
    return h


@module("prelu module", size=(1, WIDTH))
def prelu(size: int) -> nn.Module:
    return nn.PReLU(size)


# --- comparisons and logic ------------------------------------------------------------------------

RELATIONS = {name: getattr(torch, name) for name in ("gt", "ge", "lt", "le", "eq", "ne")}
LOGIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a, b: ~a,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "logical_not": lambda a, b: torch.logical_not(b),
}

elementwise(
    "compared",
    lambda h, relation, with_: RELATIONS[relation](h, with_).to(h.dtype) + 0.1 * h,
    relation=tuple(RELATIONS),
    with_=(0.0, 0.5, 0),
)
elementwise(
    "two compared",
    lambda a, b, relation: torch.where(RELATIONS[relation](a, b), a, b * 0.5),
    arity=2,
    relation=tuple(RELATIONS),
)
elementwise(
    "logic",
    lambda a, b, how: torch.where(LOGIC[how](a > 0, b > 0.5), a, 0.3 * b),
    arity=2,
    how=tuple(LOGIC),
)
elementwise("counted", lambda a, b: ((a > 0).long() + (b > 0).long()) * a, arity=2)
elementwise("as booleans", lambda h: h.bool() * 0.5 + h)
along_last("any", lambda h: (h > 1).any(-1, keepdim=True) * h)
along_last("all", lambda h: (h > -1).all(-1, keepdim=True) * h + 0.1 * h)
# An integer times 0.1 would be float32, and the network then has the digits of that.
along_last("number above", lambda h: (h > 0).sum(-1, keepdim=True).to(h.dtype) * 0.1 + h)

# --- two or three tensors -------------------------------------------------------------------------

TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": lambda a, b: a / (1.5 + torch.sin(b)),
    "gate": lambda a, b: a * b.sigmoid(),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "hypot": torch.hypot,
    "atan2": torch.atan2,
    "logaddexp": torch.logaddexp,
    "power": lambda a, b: torch.pow(0.5 + a.abs(), b.tanh()),
    "xlogy": lambda a, b: torch.xlogy(a, 0.1 + b.square()),
    "floor_divide": lambda a, b: torch.floor_divide(a, 1.5 + b.abs()),
    "remainder": lambda a, b: torch.remainder(a, 1.5 + b.abs()),
    "copysign": torch.copysign,
    "addcdiv": lambda a, b: torch.addcdiv(a, b, 2 + a.abs(), value=0.5),
    "multiplied in place": lambda a, b: a.clone().mul_(b.tanh()),
    "clamped by": lambda a, b: torch.clamp(a, -b.abs(), b.abs()),
}
for name, function in TWO.items():
    elementwise(f"two: {name}", function, arity=2)
elementwise("lerp", lambda a, b, c: torch.lerp(a, b, c.sigmoid()), arity=3)
elementwise("addcmul", lambda a, b, c: torch.addcmul(a, b, c, value=0.5), arity=3)
elementwise("where of three", lambda a, b, c: torch.where(a > b, b, c), arity=3)

# --- along the last dimension ---------------------------------------------------------------------

along_last("softmax", lambda h, scale: (h * scale).softmax(-1), scale=(1.0, 10.0, 100.0))
along_last("log_softmax", lambda h: h.log_softmax(-1))
along_last("logsumexp", lambda h: h - h.logsumexp(-1, keepdim=True))
along_last("softmin", lambda h: F.softmin(h, -1))
along_last("softmax by hand", lambda h: h.exp() / h.exp().sum(-1, keepdim=True))
along_last("softmax, masked", lambda h: h.masked_fill(masked(h), -math.inf).softmax(-1))
along_last(
    "softmax, mask computed", lambda h: h.masked_fill((h < -1) & masked(h), -math.inf).softmax(-1)
)
along_last("softmax, mask added", lambda h: (h + masked(h) * -1e30).softmax(-1))
along_last("layer norm", lambda h, eps: F.layer_norm(h, h.shape[-1:], eps=eps), eps=(1e-5, 1e-12))
along_last("rms norm", lambda h: F.rms_norm(h, h.shape[-1:]))
along_last(
    "norm by hand",
    lambda h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 0.1).sqrt(),
)
along_last("unit length", lambda h: F.normalize(h, dim=-1))
along_last("vector norm", lambda h, p: h * h.norm(p, -1, keepdim=True), p=(1, 2, 3, math.inf))
along_last("standard deviation", lambda h: h * h.std(-1, correction=0, keepdim=True))
along_last("largest", lambda h: h - h.amax(-1, keepdim=True))
along_last("smallest", lambda h: h * h.min(-1, keepdim=True).values)
along_last("cumulative sum", lambda h: h.cumsum(-1).tanh())
along_last("cumulative product", lambda h: (1 + 0.3 * h.tanh()).cumprod(-1))
along_last("cumulative maximum", lambda h: h.cummax(-1).values)
along_last("cumulative logsumexp", lambda h: h.logcumsumexp(-1))
along_last("sorted", lambda h: h.sort(-1).values)
along_last("topk", lambda h: h + h.topk(1, -1).values)
along_last("ranked", lambda h: h.gather(-1, h.argsort(-1)))
along_last("chosen by argmax", lambda h: h.sin().gather(-1, h.argmax(-1, keepdim=True)) + h)
along_last("median", lambda h: h - h.median(-1, keepdim=True).values)
along_last("ties", lambda h: h.amin(-1, keepdim=True).expand_as(h).maximum(h.mean(-1, True)))
along_last("flipped", lambda h: h.flip(-1) + 0.5 * h)
along_last("rolled", lambda h: h.roll(1, -1) * h)
along_last("spectrum", lambda h: torch.fft.fft(h).abs())
along_last("phase turned", lambda h: torch.fft.ifft(torch.fft.fft(h) * 1j).imag)
along_last("outer product", lambda h: (h.unsqueeze(-1) * h.unsqueeze(-2)).mean(-1))
along_last("padded", lambda h: F.pad(h, (1, 1), value=0.5).unfold(-1, 3, 1).amax(-1))
along_last("broadcast", lambda h: h[..., :1] * h[..., -1:] + h)
along_last("written in slices", lambda h: halves_written(h))
along_last("rows by mask", lambda h: rows_updated(h.clone(), h[..., 0] > h[..., -1]))
along_last("cross attention", lambda a, b: attend(a, b), arity=2)


def masked(h: Tensor) -> Tensor:
    """True for what is masked: one feature in three, never the first."""
    return torch.arange(h.shape[-1]) % 3 == 1


def halves_written(h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    half = (h.shape[-1] + 1) // 2
    y[..., :half] = h[..., :half].tanh()
    y[..., half:] += h[..., half:] * 2
    y[..., ::2].mul_(0.5)
    return y


def assigned(h: Tensor, index: Tensor, values: Tensor) -> Tensor:
    h[:, index] = values.tanh()
    return h


def rows_updated(h: Tensor, mask: Tensor) -> Tensor:
    h[mask] = F.silu(h[mask]) * h[mask].softmax(-1)
    return h


def attend(a: Tensor, b: Tensor) -> Tensor:
    """Every feature looks at the others."""
    scores = a.unsqueeze(-1) * b.unsqueeze(-2)
    return (scores.softmax(-1) @ b.unsqueeze(-1)).squeeze(-1)


# --- layers ---------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": partial(nn.ReLU, inplace=True),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
}


@module("linear")
def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


@module("mlp", act=tuple(ACTIVATIONS), hidden=(1, 5, 24))
def mlp(act: str, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, hidden), ACTIVATIONS[act](), nn.Linear(hidden, WIDTH))


@module("convolution 1d", kernel=(1, 3), stride=(1, 2), padding=(0, 1), act=tuple(ACTIVATIONS))
def convolution(kernel: int, stride: int, padding: int, act: str) -> nn.Module:
    convolution = nn.Conv1d(2, 4, kernel, stride, padding)
    return Chain(wide(2, 6), convolution, ACTIVATIONS[act](), normal(nn.BatchNorm1d(4)))


@module("convolution 2d", groups=(1, 2), padding=("same", "valid"), mode=("zeros", "circular"))
def convolution_2d(groups: int, padding: str, mode: str) -> nn.Module:
    convolution = nn.Conv2d(2, 4, (1, 3), padding=padding, groups=groups, padding_mode=mode)
    return Chain(wide(2, 2, 3), convolution, normal(nn.BatchNorm2d(4)), nn.ReLU(inplace=True))


@module("convolution transposed")
def convolution_transposed() -> nn.Module:
    return Chain(wide(2, 6), nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Tanh())


def normal(norm: nn.Module) -> nn.Module:
    """Give batch norm statistics of its own."""
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm.eval()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
    "batch": lambda: normal(nn.BatchNorm1d(4)),
    "layer": lambda: nn.LayerNorm([4, 3]),
    "local": lambda: nn.LocalResponseNorm(2),
}


@module("norm module", kind=tuple(NORMS))
def norm(kind: str) -> nn.Module:
    made = NORMS[kind]()
    return Chain(wide(4, 3), made)


@module("max pool", dims=(1, 2, 3), kernel=(1, 2, 3), stride=(1, 2), padding=(0, 1), ceil=(0, 1))
def max_pool(dims: int, kernel: int, stride: int, padding: int, ceil: int) -> nn.Module:
    padding = min(padding, kernel // 2)
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
    made = pool(kernel, stride, padding, ceil_mode=bool(ceil))
    return (
        Chain(wide(*((4, 3), (1, 3, 4), (1, 3, 3, 3))[dims - 1]), made)
        if dims < 3
        else Chain(nn.Linear(WIDTH, 27), wide(1, 3, 3, 3), made)
    )


@module("pool", kind=("average", "adaptive average", "adaptive max", "lp"))
def pool(kind: str) -> nn.Module:
    pools: dict[str, nn.Module] = {
        "average": nn.AvgPool1d(2, padding=1),
        "adaptive average": nn.AdaptiveAvgPool1d(4),
        "adaptive max": nn.AdaptiveMaxPool1d(4),
        "lp": nn.LPPool1d(2, 2),
    }
    return Chain(wide(2, 6), pools[kind])


@module("recurrent", cell=("lstm", "gru", "tanh", "relu"), layers=(1, 2), both=(False, True),
        batch_first=(False, True))  # fmt: skip
def recurrent(cell: str, layers: int, both: bool, batch_first: bool) -> nn.Module:
    kinds = {
        "lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": partial(nn.RNN, nonlinearity="relu")
    }  # fmt: skip
    made = kinds[cell](4, 3, layers, bidirectional=both, batch_first=batch_first)

    def run(h: Tensor) -> Tensor:
        steps = h.reshape(-1, 3, 4)
        out, _ = made(steps if batch_first else steps.transpose(0, 1))
        return out if batch_first else out.transpose(0, 1)

    return Holding(made, run)


class Holding(nn.Module):
    """A function that uses a module."""

    def __init__(self, held: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.held, self.function = held, function

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)


@module("recurrent cell", kind=("lstm", "gru", "tanh", "relu"))
def recurrent_cell(kind: str) -> nn.Module:
    cells = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}
    cell = cells[kind](4, 6) if kind in cells else nn.RNNCell(4, 6, nonlinearity=kind)

    def run(h: Tensor) -> Tensor:
        zeros = h.new_zeros(h.shape[0], 6)
        state = (zeros, zeros) if kind == "lstm" else zeros
        for step in h.reshape(-1, 3, 4).unbind(1):
            state = cell(step, state)
        return torch.cat(state, 1) if kind == "lstm" else state

    return Holding(cell, run)


@module("experts", by=("mask", "index"), chosen=(1, 2))
def experts(by: str, chosen: int) -> nn.Module:
    gate = nn.Linear(4, 3)
    held = nn.ModuleList(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(3)
    )

    def run(h: Tensor) -> Tensor:
        tokens = h.reshape(-1, 4)
        weights, places = gate(tokens).softmax(-1).topk(chosen)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(held):
            if by == "mask":
                mask = (places == number).any(-1)
                weight = torch.where(places == number, weights, 0.0).sum(-1, keepdim=True)
                out[mask] += weight[mask] * expert(tokens[mask])
            else:
                at, slot = torch.where(places == number)
                out.index_add_(0, at, weights[at, slot, None] * expert(tokens[at]))
        return out.reshape(h.shape)

    return Holding(nn.ModuleList([gate, held]), run)


@module("codes in bags", mode=("sum", "mean"), padding=(None, 0))
def codes_in_bags(mode: str, padding: int | None) -> nn.Module:
    bag = nn.EmbeddingBag(9, 5, mode=mode, padding_idx=padding)
    return Holding(bag, lambda h: bag((2 * h).round().clamp(-4, 4).long() + 4))


@module("attention module", heads=(1, 2), masked=(False, True), batch_first=(False, True))
def attention(heads: int, masked: bool, batch_first: bool) -> nn.Module:
    made = nn.MultiheadAttention(4, heads, batch_first=batch_first)
    mask = torch.ones(3, 3).triu(1).bool() if masked else None

    def run(h: Tensor) -> Tensor:
        tokens = h.reshape(-1, 3, 4)
        tokens = tokens if batch_first else tokens.transpose(0, 1)
        out, _ = made(tokens, tokens, tokens, attn_mask=mask)
        return out if batch_first else out.transpose(0, 1)

    return Holding(made, run)


@module("encoder layer", act=("relu", "gelu"), first=(False, True))
def encoder_layer(act: str, first: bool) -> nn.Module:
    made = nn.TransformerEncoderLayer(4, 2, 8, 0.0, act, batch_first=True, norm_first=first)
    return Chain(wide(3, 4), made.eval())


@module("decoder layer", arity=2)
def decoder_layer() -> nn.Module:
    made = nn.TransformerDecoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True).eval()
    return Holding(made, lambda a, b: made(a.reshape(-1, 3, 4), b.reshape(-1, 3, 4)))


MASKS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "none": lambda h: {},
    "causal": lambda h: {"is_causal": True},
    "boolean": lambda h: {"attn_mask": torch.ones(3, 3).tril().bool()},
    "blind row": lambda h: {"attn_mask": torch.tensor([[True] * 3, [False] * 3, [True] * 3])},
    "additive": lambda h: {"attn_mask": torch.linspace(-1, 1, 9, dtype=h.dtype).reshape(3, 3)},
    "minus infinity": lambda h: {"attn_mask": h.new_full((3, 3), -math.inf).triu(1)},
    "computed": lambda h: {"attn_mask": h.reshape(-1, 1, 3, 4)[..., :3]},
    "scaled": lambda h: {"scale": 3.0},
}


def self_attention(a: Tensor, b: Tensor, mask: str) -> Tensor:
    """Scaled dot-product attention of two heads of two features."""
    q, k = (h.reshape(-1, 3, 2, 2).transpose(1, 2) for h in (a, b))
    out = F.scaled_dot_product_attention(q, k, (q - k).sin(), **MASKS[mask](a))
    return out.transpose(1, 2)


whole("attention function", self_attention, arity=2, mask=tuple(MASKS))
whole("grouped queries", lambda h: F.scaled_dot_product_attention(
    h.reshape(-1, 2, 2, 3), h.reshape(-1, 2, 2, 3)[:, :1], h.reshape(-1, 2, 2, 3)[:, 1:],
    enable_gqa=True,
))  # fmt: skip


@module("bilinear", arity=2)
def bilinear() -> nn.Module:
    return nn.Bilinear(WIDTH, WIDTH, 5)


@module("feature gate")
def feature_gate() -> nn.Module:
    made = nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU(), nn.Linear(3, WIDTH), nn.Sigmoid())
    return Holding(made, lambda h: h * made(h))


@module("weight from parametrisation")
def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


@module("constants folded")
def constants() -> nn.Module:
    table = nn.Embedding(5, WIDTH)
    return Holding(table, lambda h: h + table(torch.arange(4)).softmax(-1).mean(0))


whole("glu", lambda h: F.glu(h, 1))
whole("cosine", lambda a, b: F.cosine_similarity(a.reshape(-1, 3, 4), b.reshape(-1, 3, 4), 2), 2)
whole("distances", lambda a, b: torch.cdist(a.reshape(-1, 3, 4), b.reshape(-1, 3, 4)), 2)
whole("matrix product", lambda a, b: a.reshape(-1, 3, 4) @ b.reshape(-1, 4, 3), 2)
whole("gram matrix", lambda h: h.reshape(-1, 3, 4) @ h.reshape(-1, 3, 4).mT)
whole("bmm", lambda a, b: torch.bmm(a.reshape(-1, 3, 4), b.reshape(-1, 4, 3)), 2)
whole(
    "einsum", lambda a, b: torch.einsum("bij,bkj->bik", a.reshape(-1, 3, 4), b.reshape(-1, 3, 4)), 2
)
whole("own convolution", lambda a, b: F.conv1d(
    a.reshape(1, -1, 6), b.reshape(-1, 2, 6)[..., :3].reshape(-1, 1, 3), groups=2 * a.shape[0]
).reshape(a.shape[0], -1), 2)  # fmt: skip
whole("prod", lambda h: (1 + 0.3 * h).reshape(-1, 3, 4).prod(2))
whole("singular values", lambda h: torch.linalg.svdvals(h.reshape(-1, 3, 4)))
whole("chunks", lambda h: torch.cat([c.sin() for c in h.chunk(5, 1)][::-1], 1))
whole("stacked", lambda h: torch.stack(h.split(4, 1), 2).amax(2))
whole("selected", lambda h: h[:, [0, 0, 3, 11, 5]] * h[:, 1:6])
whole("gathered", lambda h: h.gather(1, torch.tensor([[2, 0, 1]]).expand(h.shape[0], -1)).square())
whole("attention of itself", lambda h: F.scaled_dot_product_attention(*[h.reshape(-1, 3, 4)] * 3))
whole("assigned twice", lambda h: assigned(torch.zeros_like(h), torch.arange(12) % 5, h))
whole("scattered twice", lambda h: h.sin().scatter(
    1, (torch.arange(12) // 3).expand(h.shape[0], 12), h
))  # fmt: skip
whole("scattered", lambda h: torch.zeros_like(h).index_add(1, torch.arange(12) % 5, h.relu()))
whole("triangle", lambda h: h.reshape(-1, 3, 4).tril().tanh())
whole("upsampled", lambda h, mode: F.interpolate(h.reshape(-1, 2, 6), scale_factor=2, mode=mode),
      mode=("nearest", "linear"))  # fmt: skip
whole("resampled", lambda h: F.grid_sample(
    h.reshape(-1, 1, 3, 4), h.tanh().reshape(-1, 3, 2, 2), align_corners=False
))  # fmt: skip
whole("shuffled", lambda h: F.gelu(F.pixel_shuffle(h.reshape(-1, 4, 1, 3), 2)))
whole("unfolded", lambda h: F.unfold(h.reshape(-1, 1, 3, 4), 2).amax(1))
whole("padded image", lambda h, mode: F.pad(h.reshape(-1, 1, 3, 4), (1, 1, 1, 1), mode).relu(),
      mode=("reflect", "replicate", "circular", "constant"))  # fmt: skip
whole("expanded", lambda h: h.unsqueeze(2).expand(-1, -1, 3).cumsum(2).amax(1))
