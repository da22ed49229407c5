"""Assertions for test suites: a model stays explainable, a rule restores the finite difference.

:func:`assert_explainable` is one line in the tests of a research pipeline. :func:`check_rule`
checks a rule of your own at points where rules go wrong; every rule of fxshap passes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxshap.errors import AdditivityError
from fxshap.rules.core.registry import Target, operator_of
from fxshap.testing.rule_check import EACH, Case, Varying, check
from fxshap.verification.metrics import Inputs
from fxshap.verification.result import Verification
from fxshap.verification.verify import verify

__all__ = ["EACH", "Varying", "assert_explainable", "check_rule"]


# --- models -------------------------------------------------------------------------------------


def assert_explainable(
    model: nn.Module, background: Inputs, samples: Inputs, **options: Any
) -> Verification:
    """Assert that unmodified SHAP explains a model exactly, to the precision of its floats.

    Parameters
    ----------
    model : nn.Module
        Any model, or the result of :func:`fxshap.make_explainable`.
    background, samples : Tensor or sequence of Tensor
        The data for SHAP, of shape (rows, ...); a few rows of each are enough.
    **options
        Options of :func:`fxshap.verify`.

    Returns
    -------
    Verification
        The measured errors.

    Raises
    ------
    AdditivityError
        An ``AssertionError`` that names the operations that leak.
    FxshapError
        If the model cannot be explained at all.

    Examples
    --------
    >>> import torch, fxshap.testing
    >>> def test_my_model_stays_explainable():
    ...     model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU())
    ...     fxshap.testing.assert_explainable(model, torch.randn(5, 4), torch.randn(2, 4))
    >>> test_my_model_stays_explainable()
    """
    result = verify(model, background, samples, **options)
    if not result.additive:
        raise AdditivityError(f"the attributions do not add up\n\n{result}")
    return result


# --- rules --------------------------------------------------------------------------------------


def check_rule(
    op: Target,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    output_row: int | None = 0,
    state_row: int = 0,
    dtypes: Iterable[torch.dtype] = (torch.float64, torch.float32),
) -> None:
    """Assert that the rule of an operator restores the finite difference between any two points.

    The points are random but the same in every run. Their distances are 1e-12 to 1e2; some points
    are multiples of 1/2, where kinks are; some are equal, in single elements and in a whole row.
    For every row the multipliers times the differences of the arguments must sum to the cotangent
    times the difference of the outputs. The error may be 1e-12 in float64 and 1e-5 in float32,
    relative to the outputs or to 1. A single sample row must also serve for all references, and
    multipliers must be finite. The derivative of an operator declared by
    :func:`fxshap.rules.linear` is checked in the same way. A :func:`fxshap.rules.decomposition`
    must return what its operator returns.

    Parameters
    ----------
    op : operator
        An overload (``torch.ops.aten.mul.Tensor``), or what ``torch.library.custom_op`` returns.
    args : sequence
        Its arguments, with a :class:`Varying` for each that depends on a model's input.
    kwargs : mapping, optional
    output_row : int, optional
        The batch dimension of the output. ``None`` means that all is one row, ``EACH`` that the
        operation treats every element by itself.
    state_row : int
        The batch dimension of the outputs after the first.
    dtypes : iterable of torch.dtype

    Raises
    ------
    AdditivityError
        An ``AssertionError`` that shows the point with the largest error.
    RuleError
        If `op` is not an operator.

    Notes
    -----
    A rule that adds up may still be far from the Shapley values, as one that treats softmax element
    by element is. :func:`fxshap.verify` measures that distance on a small model.

    Examples
    --------
    >>> import torch
    >>> from fxshap.testing import Varying, check_rule
    >>> check_rule(torch.ops.aten.softmax.int, [Varying((2, 5)), -1])
    >>> check_rule(torch.ops.aten.mul.Tensor, [Varying((3,)), Varying((3,))])
    """
    case = Case(operator_of(op), tuple(args), dict(kwargs or {}), output_row, state_row)
    for dtype in dtypes:
        check(case, dtype)
