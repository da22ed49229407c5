"""Decisions by the explained inputs: those that change nothing are captured, others refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from fxshap.errors import CaptureError, InputError
from tests.error_cases import Model, assert_raises
from tests.helpers import assert_exact


class Chooses(Model):
    """A model whose hidden values, of 6 columns, go through a function."""

    def __init__(self, choose: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(x))
        return self.head(self.choose(h))


def loop(h: Tensor) -> Tensor:
    while not (h.abs() < 0.1).all():
        h = h / 2
    return h


def table(h: Tensor) -> Tensor:
    return h * (1.0, 2.0, 3.0, 4.0)[int(h.abs().mean() * 3)]


DECIDES = "decides by the value of a tensor"
TAKES = "takes a number out of a tensor"
TWOS = np.full(6, 2.0, dtype="float32")


def both(h: Tensor) -> Tensor:
    positive = bool(h.sum() > 10)
    large = bool(h.amax() > 10)
    return -h if positive and large else h


def nested(h: Tensor) -> Tensor:
    if h.sum() > 10:
        if h.amax() > 10:  # noqa: SIM102
            return -h
    return h


def in_one_line(h: Tensor) -> Tensor:
    return -h if h.sum() > 10 and h.amin() < 10 and h.amax() > 10 else h


CHOICES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "another computation": (lambda h: h if h.sum() > 0 else h.sin(), DECIDES),
    "a return before the end": (lambda h: h if h.norm() < 1 else h / h.norm(), DECIDES),
    "a loop": (loop, DECIDES),
    "equality": (lambda h: h if torch.equal(h, h.abs()) else h.sin(), DECIDES),
    "two conditions": (both, DECIDES),
    "a condition in another": (nested, DECIDES),
    "conditions in one line": (in_one_line, DECIDES),
    "a Python number": (lambda h: h / float(h.norm()), TAKES),
    "a choice by a Python number": (lambda h: h if float(h.mean()) > 0 else -h, TAKES),
    "an entry of a Python list": (table, TAKES),
    "an array": (lambda h: torch.from_numpy(h.detach().numpy() * TWOS), TAKES),
    "a product with an array": (lambda h: h.detach() * TWOS, TAKES),
    "a list": (lambda h: torch.tensor([[2 * v for v in row] for row in h.tolist()]), TAKES),
}


@pytest.mark.parametrize(("choose", "message"), CHOICES.values(), ids=CHOICES)
def test_a_choice_by_the_input_is_refused(choose: Callable[[Tensor], Any], message: str) -> None:
    found = assert_raises(Chooses(choose), CaptureError, message)
    assert f"{__file__}:" in found


def test_a_choice_in_a_helper_names_the_line_of_forward_too() -> None:
    message = assert_raises(Chooses(loop), CaptureError, DECIDES)
    assert "while not (h.abs() < 0.1).all()" in message
    assert f"called at {__file__}:" in message
    assert "return self.head(self.choose(h))" in message


def test_a_solver_that_chooses_its_steps_is_refused_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "torchdiffeq" / "solver.py"
    file.parent.mkdir()
    file.write_text(
        "def _adaptive_step(h):\n"
        "    step = 0.1 if h.norm() < 1 else 0.01\n"
        "    return h + step * h.sin()\n"
    )
    solver: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), solver)
    message = assert_raises(Chooses(solver["_adaptive_step"]), CaptureError, "chooses its steps")
    assert f"at {file}:2 (`step = 0.1 if" in message and f"called at {__file__}:" in message
    assert "method='rk4'" in message


def test_a_number_of_rows_as_a_size_is_refused_with_its_line() -> None:
    def sliced(h: Tensor) -> Tensor:
        order = (h[:, 0] > 0).int().argsort(descending=True)
        count = int((h[:, 0] > 0).sum())
        return torch.cat([h[order[:count]].exp(), h[order[count:]]])

    assert "count = int(" in assert_raises(Chooses(sliced), CaptureError, DECIDES)


def test_the_branch_beside_the_output_is_not_refused() -> None:
    model = Model(lambda y, h: {"logits": y, "other": h if h.sum() > 0 else -h})
    explainable = fxshap.make_explainable(model, output="logits")
    assert_exact(explainable, explainable, (torch.randn(5, 4),), (torch.randn(2, 4),), 1e-5)
    with pytest.raises(CaptureError, match=DECIDES):
        fxshap.make_explainable(model, torch.randn(5, 4), output="other")


def test_random_numbers_that_reach_the_output_are_refused() -> None:
    model = Model(lambda y, h: {"drawn": y + torch.randn_like(y), "own": y})
    fxshap.make_explainable(model, torch.randn(5, 4), output="own")
    with pytest.raises(CaptureError, match="draws random numbers"):
        fxshap.make_explainable(model, torch.randn(5, 4), output="drawn")


def test_an_unknown_operator_beside_the_output_does_not_matter() -> None:
    with torch.library._scoped_library("decisions_test", "DEF") as library:
        library.define("opaque(Tensor x) -> Tensor")
        library.impl("opaque", lambda x: x.round(), "CompositeExplicitAutograd")
        model = Model(lambda y, h: (y, torch.ops.decisions_test.opaque(h)))
        explainable = fxshap.make_explainable(model, output=0)
        assert_exact(explainable, explainable, (torch.randn(5, 4),), (torch.randn(2, 4),), 1e-5)


def test_other_answers_leave_the_model_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    class Stores(Model):
        def forward(self, x: Tensor) -> Tensor:
            self.mean = float(x.mean())
            if (x > 100).any():
                print("a branch that no input takes")
            return super().forward(x)

    model = Stores()
    model.mean = 0.0
    fxshap.make_explainable(model, torch.ones(3, 4))
    assert model.mean in (0.0, 1.0)
    assert capsys.readouterr().out == ""


def test_an_assertion_is_captured_in_bfloat16() -> None:
    class Asserts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.layer(x)
                assert y.isfinite().all()
            return y.float()

    explainable = fxshap.make_explainable(Asserts().eval())
    shap.DeepExplainer(explainable, torch.randn(5, 4)).shap_values(
        torch.randn(2, 4), check_additivity=False
    )


def test_a_number_that_no_other_answer_hits_is_found_when_a_sample_does():
    model = Chooses(lambda h: 2 * h if float(h.amax()) == 1.0 else h)  # tanh of a large number is 1
    x = torch.randn(4, 4)
    explainer = shap.DeepExplainer(fxshap.make_explainable(model), x)
    with pytest.raises(InputError, match=r"of a number that it takes out of a tensor at .*== 1\.0"):
        explainer.shap_values(1e4 * x)
