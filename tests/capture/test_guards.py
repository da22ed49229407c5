"""Decisions on what is not explained: taken as the present values take them, and then again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import shap
import torch
from captum.attr import DeepLift
from torch import Tensor, nn

import fxshap
from fxshap.errors import OutputError
from tests.helpers import assert_exact


class Held(nn.Module):
    """A hidden layer, and a function of it and of what the model holds."""

    def __init__(self, body: Callable[..., Tensor], **held: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.hidden = nn.Linear(4, 6)
        self.body = body
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.eval()

    def forward(self, x: Tensor, **bound: Any) -> Tensor:
        return self.body(self, torch.tanh(self.hidden(x)), **bound)


REFERENCES = (torch.randn(5, 4, generator=torch.Generator().manual_seed(1)),)
SAMPLES = (torch.randn(2, 4, generator=torch.Generator().manual_seed(2)),)


def is_exact(explainable: fxshap.ExplainableModule) -> None:
    """Check that an explainable model adds up through SHAP."""
    assert_exact(explainable, explainable, REFERENCES, SAMPLES, 1e-5)


def captures(explainable: fxshap.ExplainableModule) -> int:
    """Return how many captures are cached."""
    return len(explainable._calls.captures.engines)


CHANGES: dict[str, tuple[Callable[[], Held], Callable[[Held], Any]]] = {
    "a flag": (
        lambda: Held(lambda m, h: h.exp() if m.flag else h, flag=torch.tensor(False)),
        lambda m: m.flag.fill_(True),
    ),
    "a number of values": (
        lambda: Held(lambda m, h: h.topk(int(m.k)).values, k=torch.tensor(2)),
        lambda m: m.k.add_(1),
    ),
    "a temperature": (
        lambda: Held(lambda m, h: (h / float(m.t)).softmax(1), t=nn.Parameter(torch.tensor(0.5))),
        lambda m: m.t.data.mul_(3),
    ),
    "the list of a buffer": (
        lambda: Held(lambda m, h: h[:, m.at.tolist()].exp(), at=torch.tensor([0, 3])),
        lambda m: m.at.copy_(torch.tensor([1, 2])),
    ),
    "a mask of another count": (
        lambda: Held(
            lambda m, h: torch.stack([h[:, i].exp() for i in m.mask.nonzero().flatten()], 1),
            mask=torch.tensor([True, False, True, False, False, True]),
        ),
        lambda m: m.mask.logical_not_().index_fill_(0, torch.tensor([1]), False),
    ),
    "equality": (
        lambda: Held(lambda m, h: h if torch.equal(m.a, m.b) else h.exp(),
                     a=torch.ones(2), b=torch.ones(2)),
        lambda m: m.a.add_(1),
    ),
    "closeness": (
        lambda: Held(lambda m, h: h if torch.allclose(m.a, torch.ones(2)) else h.exp(),
                     a=torch.ones(2)),
        lambda m: m.a.add_(1e-3),
    ),
    "NumPy of a buffer": (
        lambda: Held(lambda m, h: h.exp() if np.any(m.a.numpy() > 2) else h, a=torch.ones(2)),
        lambda m: m.a.add_(2),
    ),
    "an array": (
        lambda: Held(lambda m, h: (h * torch.from_numpy(m.a)).exp(), a=np.ones(6, dtype="float32")),
        lambda m: m.a.fill(2.0),
    ),
    "text": (
        lambda: Held(lambda m, h: {"1": h, "2": h.exp()}[f"{m.a}"], a=torch.tensor(1)),
        lambda m: m.a.add_(1),
    ),
    "its printed form": (
        lambda: Held(lambda m, h: h if str(m.a) == "tensor(1)" else h.exp(), a=torch.tensor(1)),
        lambda m: m.a.add_(1),
    ),
    "the only selected element": (
        lambda: Held(lambda m, h: sum(h[:, i].exp()[:, None] for i in m.mask.nonzero()[:, 0]),
                     mask=torch.tensor([True, True, False, False, True, False])),
        lambda m: m.mask.copy_(torch.arange(6) == 3),
    ),
}  # fmt: skip


#: Ways to list the elements that are not 0.
LISTS: dict[str, Callable[[Tensor], Any]] = {
    "nonzero": lambda mask: mask.nonzero()[:, 0],
    "a list": lambda mask: mask.nonzero().flatten().tolist(),
    "nonzero of all dimensions": lambda mask: mask.nonzero(as_tuple=True)[0],
    "where": lambda mask: torch.where(mask)[0].tolist(),
    "argwhere": lambda mask: torch.argwhere(mask > 0.5).squeeze(1),
    "repeated": lambda mask: torch.arange(6).repeat_interleave(mask.long()),
    "selected": lambda mask: torch.arange(6).masked_select(mask.bool()).tolist(),
}


@pytest.mark.parametrize(("build", "change"), CHANGES.values(), ids=CHANGES)
def test_what_a_decision_reads_may_change(
    build: Callable[[], Held], change: Callable[[Held], Any]
) -> None:
    model = build()
    explainable = fxshap.make_explainable(model)
    is_exact(explainable)
    is_exact(explainable)
    assert captures(explainable) == 1
    change(model)
    is_exact(explainable)
    assert captures(explainable) == 2


@pytest.mark.parametrize("count", [0, 1, 2, 6])
@pytest.mark.parametrize("list_selected", LISTS.values(), ids=LISTS)
def test_a_loop_over_what_a_mask_selects(
    list_selected: Callable[[Tensor], Any], count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def body(model: Held, h: Tensor) -> Tensor:
        selected = [h[:, int(i)].exp() for i in list_selected(model.mask)]
        return torch.stack([h.sum(1), *selected], 1).sum(1, keepdim=True)

    model = Held(body, mask=torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0]))
    explainable = fxshap.make_explainable(model)
    is_exact(explainable)
    model.mask.copy_(torch.arange(6) < count)
    is_exact(explainable)
    assert "FX-traced" not in capfd.readouterr().err


@pytest.mark.parametrize("explainer", [shap.DeepExplainer, fxshap.DeepExplainer])
def test_another_number_of_outputs_needs_another_explainer(explainer: Any) -> None:
    model = Held(lambda m, h: h[:, m.mask.bool()].exp(), mask=torch.tensor([1.0, 1, 0, 0, 1, 0]))
    explainable = fxshap.make_explainable(model)
    before = explainer(explainable, REFERENCES[0])
    before.shap_values(SAMPLES[0])
    for count in (1, 2, 5):
        model.mask.copy_(torch.arange(6) < count)
        with pytest.raises(OutputError, match=rf"{count} outputs, and returned 3 .* another expl"):
            before.shap_values(SAMPLES[0])
        is_exact(explainable)
    model.mask.zero_()
    with pytest.raises(OutputError, match="has no outputs to explain"):
        explainer(explainable, REFERENCES[0])


def test_a_parameter_that_is_not_read_needs_no_new_capture() -> None:
    model = Held(lambda m, h: h * m.scale if m.flag else h,
                 flag=torch.tensor(True), scale=nn.Parameter(torch.ones(6)))  # fmt: skip
    explainable = fxshap.make_explainable(model)
    is_exact(explainable)
    model.scale.data.mul_(2)
    is_exact(explainable)
    assert captures(explainable) == 1


def unless_all(model: Held, h: Tensor, mask: Tensor) -> Tensor:
    return h.exp() if mask.all() else (h * mask)[:, : int(mask.sum(1).max())]


ALL, SOME = torch.ones(1, 6), torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 0.0]])


def test_another_mask_is_captured_again_and_the_first_is_not() -> None:
    explainable = fxshap.make_explainable(Held(unless_all))
    for mask in (ALL, SOME, ALL, SOME):
        is_exact(explainable.bind(mask=mask))
    assert captures(explainable) == 2


def test_a_mask_for_every_sample_decides_with_all_of_its_rows() -> None:
    explainable = fxshap.make_explainable(Held(unless_all)).bind(mask=torch.cat([ALL, SOME]))
    samples, references = SAMPLES[0], REFERENCES[0][:2]
    with torch.no_grad():
        change = explainable(samples) - explainable(references)
    assert change.shape == (2, 6)  # not all elements of the mask are 1, so there is no exp
    values = DeepLift(explainable).attribute(samples, references, target=1)
    assert torch.allclose(values.sum(1), change[:, 1], atol=1e-6)


def test_the_batched_explainer_takes_the_decision_of_all_samples() -> None:
    explainable = fxshap.make_explainable(Held(unless_all))
    explainer = fxshap.DeepExplainer(explainable.bind(mask=ALL), REFERENCES[0])
    values = explainer.shap_values(SAMPLES[0])
    change = explainable.bind(mask=ALL)(*SAMPLES) - explainable.bind(mask=ALL)(*REFERENCES).mean(0)
    assert np.abs(values.sum(1) - change.detach().numpy()).max() < 1e-5


def test_a_tensor_that_the_model_counts_up_is_not_changed_by_a_capture() -> None:
    def body(model: Held, h: Tensor) -> Tensor:
        model.calls += 1
        return h.exp() if int(model.calls) > 0 else h

    model = Held(body, calls=torch.tensor(0))
    fxshap.make_explainable(model).capture(*REFERENCES)
    assert int(model.calls) == 0


def test_random_numbers_stay_as_they_were() -> None:
    model = Held(lambda m, h: h if torch.rand(3).sum() > -1 else h.exp())
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fxshap.make_explainable(model).capture(*REFERENCES)
    assert torch.equal(torch.rand(2), expected)


def test_a_decision_by_an_input_that_is_bound_for_shap_names_no_input() -> None:
    explainable = fxshap.make_explainable(
        Held(lambda m, h, other: h.exp() if other.sum() > 0 else h)
    ).bind(other=torch.ones(1, 2))
    shap.DeepExplainer(explainable, REFERENCES[0]).shap_values(SAMPLES[0])
    is_exact(explainable.bind(other=-torch.ones(1, 2)))
    assert captures(explainable) == 2
