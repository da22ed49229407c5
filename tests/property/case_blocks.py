"""Blocks of all operations that have a case of a rule."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxshap.ops.dtypes import differentiable
from fxshap.testing.rule_check import EACH, Case, Varying
from tests.property.block import (
    WIDTH,
    Block,
    add,
    elementwise,
)
from tests.rules.cases import ALL, RECURRENT

# --- every case of a rule -------------------------------------------------------------------------

#: How values are mapped into the domain of an argument.
HOW = ("smoothly", "clamped")
LOG_SOFTMAX = (torch.ops.aten.log_softmax.int, torch.ops.aten.special_log_softmax.default)
CASES: dict[str, list[Case]] = defaultdict(list)
for case in ALL:
    if any(varying.is_complex for varying in case.varying):
        continue
    # Constant initial states fix the number of rows.
    if len(case.varying) > 1 or not any(case is other for other in RECURRENT):
        CASES[f"op {case}"].append(case)


def into_interval(value: Tensor, low: float, high: float, how: str) -> Tensor:
    """Map values into an interval, smoothly or with kinks at its bounds."""
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
    """Call the operation of a case with these values of its varying arguments."""
    flat_arguments, structure = pytree.tree_flatten((case.args, case.kwargs))
    waiting = iter(values)
    given = [next(waiting) if isinstance(a, Varying) else a for a in flat_arguments]
    args, kwargs = pytree.tree_unflatten(given, structure)
    return case.target(*args, **kwargs)


def curve(h: Tensor, name: str, variant: int, how: str) -> Tensor:
    """Apply the univariate function of a case to every element, mapped into its domain."""
    case = CASES[name][variant]
    (varying,) = case.varying
    return call(case, [into_interval(h, varying.low, varying.high, how)])


class FromCase(nn.Module):
    """The operation of a case, whose varying arguments are outputs of linear layers."""

    def __init__(self, name: str, variant: int, how: str) -> None:
        super().__init__()
        self.case, self.how = CASES[name][variant], how
        self.sources = nn.ModuleList(
            nn.Linear(WIDTH, math.prod(varying.shape)) for varying in self.case.varying
        )

    def argument(self, varying: Varying, value: Tensor) -> Tensor:
        value = into_interval(
            value.reshape(-1, *varying.shape), varying.low, varying.high, self.how
        )
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
            return torch.stack([join_outputs(result, None, None) for result in results])
        y = join_outputs(call(case, values), max(case.output_row, 0), case.state_row)
        if case.target in LOG_SOFTMAX and case.varying[0].masked:  # drop the outputs of -inf
            y = y.reshape(-1, 5, 6)
            y = torch.cat([y[..., :1], y[..., 2:]], -1).flatten(1)
        return y


def join_outputs(result: Any, row: int | None, state_row: int | None) -> Tensor:
    """Concatenate the floating-point outputs to (rows, anything), or, without rows, to a vector."""
    outputs = [result] if isinstance(result, Tensor) else list(result)
    outputs = [torch.view_as_real(y) if y.is_complex() else y for y in outputs]
    rows = [row] + [state_row] * (len(outputs) - 1)
    floating = [
        y.flatten() if r is None else y.movedim(r, 0).reshape(y.shape[r], -1)
        for y, r in zip(outputs, rows, strict=True)
        if differentiable(y)
    ]
    return torch.cat(floating, -1)


for name, cases in CASES.items():
    variants = {"variant": tuple(range(len(cases))), "how": HOW}
    constants = pytree.tree_leaves((cases[0].args, cases[0].kwargs))
    if cases[0].output_row is EACH and not any(isinstance(c, Tensor) for c in constants):
        elementwise(name, partial(curve, name=name), **variants)
    else:
        looped = any(case.output_row is None for case in cases)
        add(name, Block(partial(FromCase, name), options=variants, fixes_rows=looped))
