"""Backgrounds, samples and outputs of unusual kinds, layouts and sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from fxshap.errors import InputError
from tests.end_to_end.small_models import (
    REFERENCES,
    SAMPLES,
    Image,
    assert_as_new,
    data,
    images,
    values,
)
from tests.helpers import assert_exact, explain


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
    "expanded features": lambda x: x[:, :, :, :1].expand(-1, -1, -1, 6),
    "every other row": lambda x: x[::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels last of one row": lambda x: x[:1].contiguous(memory_format=torch.channels_last),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "not a leaf": lambda x: x.clone().requires_grad_() * 1,
    "inference mode": inference,
    "a parameter": lambda x: nn.Parameter(x.clone()),
}


@pytest.mark.parametrize("what", ["references", "samples", "both"])
@pytest.mark.parametrize("name", STRANGE)
def test_tensors_of_every_kind(name, what):
    references, samples = images(6, 1), images(3, 2)
    if what != "samples":
        references = STRANGE[name](references)
    if what != "references":
        samples = STRANGE[name](samples)
    plain = [x.detach().clone().contiguous() for x in (references, samples)]
    model = Image()
    found = explain(fxshap.make_explainable(model), [references], [samples])
    expected = explain(fxshap.make_explainable(model), plain[:1], plain[1:])
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-13)
    for given in (references, samples):
        assert not given.is_leaf or given.grad is None


@pytest.mark.parametrize("samples", [1, 3])
def test_one_reference(model, samples):
    explainable = fxshap.make_explainable(model)
    assert_exact(model, explainable, [REFERENCES[:1]], [SAMPLES[:samples]], 1e-13)


def test_one_feature():
    model = nn.Sequential(nn.Linear(1, 5), nn.GELU(), nn.Linear(5, 1)).double()
    x, references = data(3, 4)[:, :1], data(4, 5)[:, :1]
    (phi,) = assert_exact(model, fxshap.make_explainable(model), [references], [x], 1e-13)
    with torch.no_grad():
        np.testing.assert_allclose(phi[:, 0], model(x) - model(references).mean(0), atol=1e-13)


def test_no_samples(model):
    explainable = fxshap.make_explainable(model)
    explainer = shap.DeepExplainer(explainable, REFERENCES)
    assert explainer.shap_values(SAMPLES[:0], check_additivity=False).shape == (0, 4, 3)
    assert_as_new(explainable)


def test_no_references_are_refused(model):
    explainable = fxshap.make_explainable(model)
    with pytest.raises(InputError, match="the background has no rows"):
        shap.DeepExplainer(explainable, REFERENCES[:0]).shap_values(SAMPLES)
    assert_as_new(explainable)


def test_ten_thousand_references(model):
    found = explain(fxshap.make_explainable(model), [data(10_000, 1)], [SAMPLES[:1]])
    chunked = fxshap.make_explainable(model, reference_batch_size=999)
    np.testing.assert_allclose(
        found[0], explain(chunked, [data(10_000, 1)], [SAMPLES[:1]])[0], rtol=0, atol=1e-13
    )


def test_an_output_of_one_column(model):
    one = fxshap.make_explainable(model, output=1)
    (found,), (whole,) = values(one), values(fxshap.make_explainable(model))
    np.testing.assert_allclose(found[..., 0], whole[..., 1], rtol=0, atol=1e-13)


class Constant(nn.Module):
    """Outputs that do not depend on the input: all of them, or one of two."""

    def __init__(self, partly: bool) -> None:
        super().__init__()
        self.bias, self.partly = nn.Parameter(torch.ones(2).double()), partly

    def forward(self, x: Tensor) -> Tensor:
        still = self.bias.exp().expand(len(x), 2)
        return torch.cat([still, x.square()[:, :1]], 1) if self.partly else still


@pytest.mark.parametrize("partly", [False, True])
def test_outputs_that_do_not_depend_on_the_input(partly):
    model = Constant(partly)
    (found,) = assert_exact(model, fxshap.make_explainable(model), [REFERENCES], [SAMPLES], 1e-13)
    assert not found[..., :2].any()
    assert not partly or found[..., 2].any()


def test_an_input_that_is_not_used():
    class Ignores(nn.Module):
        def forward(self, unused: Tensor, x: Tensor) -> Tensor:
            return x.tanh()

    found = assert_exact(
        Ignores(), fxshap.make_explainable(Ignores()), [REFERENCES] * 2, [SAMPLES] * 2, 1e-13
    )
    assert not found[0].any() and found[1].any()
