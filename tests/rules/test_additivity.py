"""Every rule restores the finite difference between any two endpoints."""

from __future__ import annotations

import pytest
import torch

from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.registry import RULES
from fxshap.rules.smoothed_activations import activation, variance
from fxshap.rules.smoothed_logsumexp import of_logits
from fxshap.rules.smoothed_maxima import maximum
from fxshap.testing.rule_check import Case, check, cotangents
from tests.rules.cases import ALL

FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
CASES = pytest.mark.parametrize("case", ALL, ids=str)


def test_every_rule_has_a_case() -> None:
    covered = {case.target for case in ALL} | {case.target.overloadpacket for case in ALL}
    missing = {key for key, rule in RULES.items() if rule.backward is not None} - covered
    # The result of masked_select has no fixed size where its mask varies. The other two are no
    # operators, and their variance is 0 at the reference: tests/passes/test_propagate_variances.py
    # tests them.
    assert missing == {torch.ops.aten.masked_select, variance, activation, maximum, of_logits}


@FLOATS
@CASES
def test_multipliers_restore_the_finite_difference(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@CASES
def test_half_precision_runs_where_the_operation_does(case: Case, dtype: torch.dtype) -> None:
    operation, r, x = case.draw(dtype)
    try:
        grad = cotangents(operation(*r))
    except (NotImplementedError, RuntimeError):
        return  # PyTorch has no half-precision kernel of this operation on this machine
    multipliers = apply_rule(operation, r, x, grad)
    for m, end in zip(multipliers, r, strict=True):
        assert m is None or (m.shape, m.dtype) == (end.shape, end.dtype)
