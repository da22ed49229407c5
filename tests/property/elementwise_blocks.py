"""Elementwise blocks: activations, comparisons, and functions of two or three tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.property.block import (
    WIDTH,
    along_last,
    elementwise,
    module,
)

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
elementwise("assigned by mask", lambda h: write_masked(h.clone(), h < 0.5, 0.25))
elementwise("updated by mask", lambda h: update_masked(h.clone(), h > 0.5))
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


def write_masked(h: Tensor, mask: Tensor, value: float) -> Tensor:
    h[mask] = value
    return h


def update_masked(h: Tensor, mask: Tensor) -> Tensor:
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
