"""Choices by the input, as floats."""

from __future__ import annotations

import torch

from fxshap.testing.rule_check import Case
from tests.rules.cases.base import v

ours = torch.ops.fxshap

CHOICES = [
    Case(ours.ranks.default, (v(5), "argmax", 0, 1), note="argmax"),
    Case(ours.ranks.default, (v(5), "argmin", 0, 1), note="argmin"),
    Case(ours.ranks.default, (v(4, 6), "topk", 0, 3), note="topk"),
    Case(ours.ranks.default, (v(6), "least", 0, 2), note="least"),
    Case(ours.ranks.default, (v(5), "ascending", 0, 5), note="ascending"),
    Case(ours.ranks.default, (v(3, 5), "descending", 0, 5), note="descending"),
    Case(ours.ranks.default, (v(5), "kth", 2, 1), note="kth"),
    Case(ours.one_hot_position.default, (v(5), 7)),
]
