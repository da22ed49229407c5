"""Softmax and its family."""

from __future__ import annotations

import torch

from fxshap.testing.rule_check import Case, Varying
from tests.rules.cases.base import v

aten = torch.ops.aten

LOGITS = {"ordinary": v(5, 6), "masked": Varying((5, 6), masked=True)}

SOFTMAX = [
    *(
        Case(t, (logits, 2), note=note)
        for note, logits in LOGITS.items()
        for t in (
            aten.softmax.int, aten.special_softmax.default, aten._safe_softmax.default,
            aten.log_softmax.int, aten.special_log_softmax.default,
        )
    ),
    Case(aten._softmax.default, (v(5, 6), 1, False)),
    Case(aten._log_softmax.default, (v(5, 6), 1, False)),
    Case(aten.logsumexp.default, (v(5, 6), [2])),
    Case(aten.logsumexp.default, (v(5, 6), [1, -1], True), note="over two"),
    Case(aten.logsumexp.default, (LOGITS["masked"], [2]), note="masked"),
    Case(aten.special_logsumexp.default, (v(5, 6), [1])),
]  # fmt: skip
