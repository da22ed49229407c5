"""A state that a model keeps from call to call is fixed while it is explained."""

from __future__ import annotations

import random

import numpy as np
import pytest
import shap
import torch
from captum.attr import DeepLift
from torch import Tensor, nn

import fxshap
from fxshap.errors import CaptureError
from fxshap.state import restore_state


def draw(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 2, generator=torch.Generator().manual_seed(seed))


class Recurrent(nn.Module):
    """A GRU with an initial state, which subclasses give."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 2)
        self.state: Tensor | None = None
        self.seen: list[Tensor] = []
        self.calls = 0
        self.register_buffer("average", torch.full((1, 1, 5), 0.5))

    def run(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = None if state is None else state.expand(1, x.size(0), 5).contiguous()
        outputs, last = self.layer(x, state)
        return self.head(outputs[:, -1]), last.detach().mean(1, keepdim=True)


class Kept(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        y, self.state = self.run(x, self.state)
        return y


class KeptOfEveryRow(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        if self.state is None or self.state.size(1) != x.size(0):
            self.state = torch.zeros(1, x.size(0), 5)
        outputs, self.state = self.layer(x, self.state)
        return self.head(outputs[:, -1])


class KeptInABuffer(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        y, last = self.run(x, self.average)
        self.average.copy_(last)
        return y


class KeptAsANewBuffer(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        y, self.average = self.run(x, self.average)
        return y


class KeptInAList(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        y, last = self.run(x, self.seen[-1] if self.seen else None)
        self.seen.append(last)
        return y


class Counted(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.run(x, None)[0] * self.calls


STATEFUL = [Kept, KeptOfEveryRow, KeptInABuffer, KeptAsANewBuffer, KeptInAList, Counted]


def state_of(model: Recurrent) -> tuple[object, ...]:
    return model.state, list(model.seen), model.calls, model.average


@pytest.mark.parametrize("architecture", STATEFUL)
def test_shap_explains_a_model_from_the_state_that_it_has(architecture):
    model = architecture().eval()
    with torch.no_grad():
        model(draw(7, 3))  # the state is no longer the first one
    before, values = state_of(model), model.average.clone()
    explainable = fxshap.make_explainable(model)
    attributions = shap.DeepExplainer(explainable, draw(5, 1)).shap_values(draw(2, 2))
    assert all(a is b or a == b for a, b in zip(before, state_of(model), strict=True))
    with restore_state(model), torch.no_grad():
        expected = model(draw(5, 1)).mean(0)
    with restore_state(model), torch.no_grad():
        change = model(draw(2, 2)) - expected
    assert abs(attributions.sum((1, 2)) - change.numpy()).max() <= 1e-5
    assert torch.equal(model.average, values)


@pytest.mark.parametrize("architecture", STATEFUL)
def test_the_check_of_captum_calls_a_model_in_the_same_state(architecture):
    explainable = fxshap.make_explainable(architecture().eval())
    _, delta = DeepLift(explainable).attribute(
        draw(3, 2), draw(3, 1), target=1, return_convergence_delta=True
    )
    assert delta.abs().max() <= 1e-5


def test_bound_arguments_are_looked_at_in_the_same_state():
    """Whether a bound tensor has rows is found out by calling the model."""

    class Bound(Counted):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x) * scale

    model, scale = Bound().eval(), torch.tensor([[2.0, 3.0]])
    model(draw(7, 3), scale)
    explainable = fxshap.make_explainable(model).bind(scale=scale)
    shap.DeepExplainer(explainable, draw(5, 1)).shap_values(draw(2, 2))
    assert model.calls == 1
    explainable(draw(2, 2))
    assert model.calls == 2


def test_a_call_of_the_users_changes_the_state():
    explainable = fxshap.make_explainable(Counted().eval())
    explainable(draw(2, 1))
    assert explainable.original_model.calls == 1


def test_state_is_restored_after_an_error():
    model = KeptInABuffer()
    before = model.average.clone()
    with pytest.raises(ZeroDivisionError), restore_state(model):
        model(draw(2, 1))
        assert not torch.equal(model.average, before)
        raise ZeroDivisionError
    assert torch.equal(model.average, before)


# --- random states --------------------------------------------------------------------------------


class FromNumPy(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, torch.from_numpy(np.random.randn(1, 1, 5)).float())[0]


class FromPython(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, torch.full((1, 1, 5), random.random()))[0]


class OwnGenerator(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, torch.tensor(self.numbers.normal(size=(1, 1, 5))).float())[0]


class FromTorch(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, torch.randn(1, x.size(0), 5))[0]


class FromAGenerator(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return self.run(x, torch.randn(1, x.size(0), 5, generator=generator))[0]


class Initialized(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, nn.init.xavier_uniform_(torch.empty(1, x.size(0), 5)))[0]


@pytest.mark.parametrize("architecture", [FromTorch, FromAGenerator, Initialized])
def test_random_numbers_of_torch_are_rejected_with_the_line(architecture):
    explainable = fxshap.make_explainable(architecture().eval())
    with pytest.raises(CaptureError, match=r"draws random numbers .*test_state\.py:\d+ \("):
        shap.DeepExplainer(explainable, draw(5, 1)).shap_values(draw(2, 2))


@pytest.mark.parametrize("architecture", [FromNumPy, FromPython, OwnGenerator])
def test_random_numbers_of_other_libraries_are_rejected_by_name(architecture):
    explainable = fxshap.make_explainable(architecture().eval())
    message = f"{architecture.__name__} returns another output when it is called again.*NumPy"
    with pytest.raises(CaptureError, match=message):
        shap.DeepExplainer(explainable, draw(5, 1)).shap_values(draw(2, 2))
