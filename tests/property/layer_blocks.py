"""Blocks of layers, and of functions of whole rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.property.block import (
    WIDTH,
    Chain,
    ModuleFunction,
    module,
    reshape_rows,
    rowwise,
)

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
    return Chain(
        reshape_rows(2, 6),
        convolution,
        ACTIVATIONS[act](),
        with_random_statistics(nn.BatchNorm1d(4)),
    )


@module("convolution 2d", groups=(1, 2), padding=("same", "valid"), mode=("zeros", "circular"))
def convolution_2d(groups: int, padding: str, mode: str) -> nn.Module:
    convolution = nn.Conv2d(2, 4, (1, 3), padding=padding, groups=groups, padding_mode=mode)
    return Chain(
        reshape_rows(2, 2, 3),
        convolution,
        with_random_statistics(nn.BatchNorm2d(4)),
        nn.ReLU(inplace=True),
    )


@module("convolution transposed")
def convolution_transposed() -> nn.Module:
    return Chain(reshape_rows(2, 6), nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Tanh())


def with_random_statistics(norm: nn.Module) -> nn.Module:
    """Give a batch norm random statistics, and return it in evaluation mode."""
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm.eval()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
    "batch": lambda: with_random_statistics(nn.BatchNorm1d(4)),
    "layer": lambda: nn.LayerNorm([4, 3]),
    "local": lambda: nn.LocalResponseNorm(2),
}


@module("norm module", kind=tuple(NORMS))
def norm(kind: str) -> nn.Module:
    made = NORMS[kind]()
    return Chain(reshape_rows(4, 3), made)


@module("max pool", dims=(1, 2, 3), kernel=(1, 2, 3), stride=(1, 2), padding=(0, 1), ceil=(0, 1))
def max_pool(dims: int, kernel: int, stride: int, padding: int, ceil: int) -> nn.Module:
    padding = min(padding, kernel // 2)
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
    made = pool(kernel, stride, padding, ceil_mode=bool(ceil))
    return (
        Chain(reshape_rows(*((4, 3), (1, 3, 4), (1, 3, 3, 3))[dims - 1]), made)
        if dims < 3
        else Chain(nn.Linear(WIDTH, 27), reshape_rows(1, 3, 3, 3), made)
    )


@module("pool", kind=("average", "adaptive average", "adaptive max", "lp"))
def pool(kind: str) -> nn.Module:
    pools: dict[str, nn.Module] = {
        "average": nn.AvgPool1d(2, padding=1),
        "adaptive average": nn.AdaptiveAvgPool1d(4),
        "adaptive max": nn.AdaptiveMaxPool1d(4),
        "lp": nn.LPPool1d(2, 2),
    }
    return Chain(reshape_rows(2, 6), pools[kind])


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

    return ModuleFunction(made, run)


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

    return ModuleFunction(cell, run)


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

    return ModuleFunction(nn.ModuleList([gate, held]), run)


@module("codes in bags", mode=("sum", "mean"), padding=(None, 0))
def codes_in_bags(mode: str, padding: int | None) -> nn.Module:
    bag = nn.EmbeddingBag(9, 5, mode=mode, padding_idx=padding)
    return ModuleFunction(bag, lambda h: bag((2 * h).round().clamp(-4, 4).long() + 4))


@module("attention module", heads=(1, 2), masked=(False, True), batch_first=(False, True))
def attention(heads: int, masked: bool, batch_first: bool) -> nn.Module:
    made = nn.MultiheadAttention(4, heads, batch_first=batch_first)
    mask = torch.ones(3, 3).triu(1).bool() if masked else None

    def run(h: Tensor) -> Tensor:
        tokens = h.reshape(-1, 3, 4)
        tokens = tokens if batch_first else tokens.transpose(0, 1)
        out, _ = made(tokens, tokens, tokens, attn_mask=mask)
        return out if batch_first else out.transpose(0, 1)

    return ModuleFunction(made, run)


@module("encoder layer", act=("relu", "gelu"), first=(False, True))
def encoder_layer(act: str, first: bool) -> nn.Module:
    made = nn.TransformerEncoderLayer(4, 2, 8, 0.0, act, batch_first=True, norm_first=first)
    return Chain(reshape_rows(3, 4), made.eval())


@module("decoder layer", arity=2)
def decoder_layer() -> nn.Module:
    made = nn.TransformerDecoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True).eval()
    return ModuleFunction(made, lambda a, b: made(a.reshape(-1, 3, 4), b.reshape(-1, 3, 4)))


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
    """Scaled dot-product attention with two heads of two features."""
    q, k = (h.reshape(-1, 3, 2, 2).transpose(1, 2) for h in (a, b))
    out = F.scaled_dot_product_attention(q, k, (q - k).sin(), **MASKS[mask](a))
    return out.transpose(1, 2)


rowwise("attention function", self_attention, arity=2, mask=tuple(MASKS))
rowwise("grouped queries", lambda h: F.scaled_dot_product_attention(
    h.reshape(-1, 2, 2, 3), h.reshape(-1, 2, 2, 3)[:, :1], h.reshape(-1, 2, 2, 3)[:, 1:],
    enable_gqa=True,
))  # fmt: skip


@module("bilinear", arity=2)
def bilinear() -> nn.Module:
    return nn.Bilinear(WIDTH, WIDTH, 5)


@module("feature gate")
def feature_gate() -> nn.Module:
    made = nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU(), nn.Linear(3, WIDTH), nn.Sigmoid())
    return ModuleFunction(made, lambda h: h * made(h))


@module("weight from parametrisation")
def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


@module("constants folded")
def constants() -> nn.Module:
    table = nn.Embedding(5, WIDTH)
    return ModuleFunction(table, lambda h: h + table(torch.arange(4)).softmax(-1).mean(0))


def assign(h: Tensor, index: Tensor, values: Tensor) -> Tensor:
    h[:, index] = values.tanh()
    return h


rowwise("glu", lambda h: F.glu(h, 1))
rowwise("cosine", lambda a, b: F.cosine_similarity(a.reshape(-1, 3, 4), b.reshape(-1, 3, 4), 2), 2)
rowwise("distances", lambda a, b: torch.cdist(a.reshape(-1, 3, 4), b.reshape(-1, 3, 4)), 2)
rowwise("matrix product", lambda a, b: a.reshape(-1, 3, 4) @ b.reshape(-1, 4, 3), 2)
rowwise("gram matrix", lambda h: h.reshape(-1, 3, 4) @ h.reshape(-1, 3, 4).mT)
rowwise("bmm", lambda a, b: torch.bmm(a.reshape(-1, 3, 4), b.reshape(-1, 4, 3)), 2)
rowwise(
    "einsum", lambda a, b: torch.einsum("bij,bkj->bik", a.reshape(-1, 3, 4), b.reshape(-1, 3, 4)), 2
)
rowwise("own convolution", lambda a, b: F.conv1d(
    a.reshape(1, -1, 6), b.reshape(-1, 2, 6)[..., :3].reshape(-1, 1, 3), groups=2 * a.shape[0]
).reshape(a.shape[0], -1), 2)  # fmt: skip
rowwise("prod", lambda h: (1 + 0.3 * h).reshape(-1, 3, 4).prod(2))
rowwise("singular values", lambda h: torch.linalg.svdvals(h.reshape(-1, 3, 4)))
rowwise("chunks", lambda h: torch.cat([c.sin() for c in h.chunk(5, 1)][::-1], 1))
rowwise("stacked", lambda h: torch.stack(h.split(4, 1), 2).amax(2))
rowwise("selected", lambda h: h[:, [0, 0, 3, 11, 5]] * h[:, 1:6])
rowwise(
    "gathered", lambda h: h.gather(1, torch.tensor([[2, 0, 1]]).expand(h.shape[0], -1)).square()
)
rowwise("attention of itself", lambda h: F.scaled_dot_product_attention(*[h.reshape(-1, 3, 4)] * 3))
rowwise("assigned twice", lambda h: assign(torch.zeros_like(h), torch.arange(12) % 5, h))
rowwise("scattered twice", lambda h: h.sin().scatter(
    1, (torch.arange(12) // 3).expand(h.shape[0], 12), h
))  # fmt: skip
rowwise("scattered", lambda h: torch.zeros_like(h).index_add(1, torch.arange(12) % 5, h.relu()))
rowwise("triangle", lambda h: h.reshape(-1, 3, 4).tril().tanh())
rowwise("upsampled", lambda h, mode: F.interpolate(h.reshape(-1, 2, 6), scale_factor=2, mode=mode),
      mode=("nearest", "linear"))  # fmt: skip
rowwise("resampled", lambda h: F.grid_sample(
    h.reshape(-1, 1, 3, 4), h.tanh().reshape(-1, 3, 2, 2), align_corners=False
))  # fmt: skip
rowwise("shuffled", lambda h: F.gelu(F.pixel_shuffle(h.reshape(-1, 4, 1, 3), 2)))
rowwise("unfolded", lambda h: F.unfold(h.reshape(-1, 1, 3, 4), 2).amax(1))
rowwise("padded image", lambda h, mode: F.pad(h.reshape(-1, 1, 3, 4), (1, 1, 1, 1), mode).relu(),
      mode=("reflect", "replicate", "circular", "constant"))  # fmt: skip
rowwise("expanded", lambda h: h.unsqueeze(2).expand(-1, -1, 3).cumsum(2).amax(1))
