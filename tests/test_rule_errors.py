"""Errors of rules: operators that have none, and rules that fail."""

import re

import pytest
import torch
from torch import Tensor, nn

import fxshap
from fxshap.errors import (
    BatchMixingError,
    RuleError,
)
from fxshap.rules.core.registry import RULES, Rule
from fxshap.runtime.batching import probe_layout
from tests.error_cases import (
    REFERENCES,
    SAMPLES,
    FunctionModule,
    Model,
    assert_raises,
    assert_works_as_new,
)
from tests.helpers import (
    assert_exact,
)


@torch.library.custom_op("fxshap_test::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


@square.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


LIBRARY = torch.library.Library("fxshap_test", "FRAGMENT")
LIBRARY.define("cube(Tensor x) -> Tensor")
LIBRARY.impl("cube", lambda x: x * x * x, "CPU")
LIBRARY.impl("cube", torch.empty_like, "Meta")


@pytest.mark.parametrize(
    "operator",
    [
        torch.ops.fxshap_test.square,
        torch.ops.fxshap_test.cube,
        lambda x: torch.igamma(x.exp(), x.exp()),
        lambda x: torch.stack([torch.histc(row, 3) for row in x.unbind()]),
    ],
    ids=["custom_op", "library", "igamma", "histc"],
)
def test_operators_without_derivative_and_rule_raise_an_error(operator):
    model = Model(lambda y, h: model.block(y))
    model.block = nn.Sequential(nn.Identity(), FunctionModule(operator)).eval()
    message = assert_raises(model, RuleError, "has no derivative and no rule")
    assert re.match(
        r"(fxshap_test\.\w+|aten\.(igamma|histc))\.default \(.* in block\.1, .*\.py:\d+\)", message
    )
    assert "register_autograd" in message and "fxshap.rules" in message


def test_an_operator_without_derivative_needs_only_a_rule(monkeypatch):
    def secant(operation, reference, sample, grad):
        (r,), (x,) = reference, sample
        return (grad * (x + r),)

    monkeypatch.setitem(RULES, torch.ops.fxshap_test.square, Rule("square", secant))
    model = Model(lambda y, h: torch.ops.fxshap_test.square(y))
    assert_exact(model, fxshap.make_explainable(model), [REFERENCES], [SAMPLES], 1e-5)


def test_a_rule_that_fails_names_operator_and_module(monkeypatch):
    def broken(operation, reference, sample, grad):
        raise ZeroDivisionError("the reason")

    monkeypatch.setitem(RULES, torch.ops.aten.tanh, Rule("broken", broken))
    model = Model(lambda y, h: model.block(y))
    model.block = nn.Sequential(nn.Tanh()).eval()
    assert_raises(
        model,
        RuleError,
        r"the rule 'broken' failed on aten.tanh.default \(tanh in block.0, .*:\d+\): the reason",
    )
    monkeypatch.undo()
    assert_works_as_new(fxshap.make_explainable(model))


@pytest.mark.parametrize(
    "returned, expected",
    [
        (lambda grad: grad, "it returned a Tensor, not a tuple of 1"),
        (lambda grad: (grad, grad), "it returned a tuple, not a tuple of 1"),
        (lambda grad: (grad[:, :2],), r"a cotangent of shape \(5, 2\) for the varying argument 0"),
    ],
    ids=["tensor", "too many", "shape"],
)
def test_the_result_of_a_rule_is_checked(monkeypatch, returned, expected):
    def rule(operation, reference, sample, grad):
        return returned(grad)

    monkeypatch.setitem(RULES, torch.ops.aten.tanh, Rule("mine", rule))
    model = Model(lambda y, h: y.tanh())
    message = assert_raises(
        model, RuleError, f"the rule 'mine' failed on aten.tanh.default.*{expected}"
    )
    assert re.search(r"\(tanh, .*error_cases\.py:\d+\)", message)


@pytest.mark.parametrize(
    "end",
    [
        lambda y, h: y * (h.argmax(1, keepdim=True) ^ 1).float(),
        lambda y, h: y + torch.arange(108.0).reshape(6, 6, 3)[h.argmax(1), h.argmin(1)],
    ],
    ids=["bits", "two indices"],
)
def test_dependence_only_through_integers_raises_an_error(end):
    assert_raises(Model(end), RuleError, "depends on the input only through integers or booleans")


def test_rounding_that_depends_on_the_number_of_rows_is_not_mixing():
    def observe(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x.sum(1, keepdim=True) * (1 + 0.1 * len(x)), (x,)

    assert not probe_layout(observe, [REFERENCES]).tile
    with pytest.raises(BatchMixingError):
        probe_layout(lambda x: (observe(x)[0] * len(x), (x,)), [REFERENCES])
