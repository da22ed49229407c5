"""Arguments with a row for each sample, through every tool: as of one sample at a time."""

from __future__ import annotations

import numpy as np
import pytest
import shap
import torch
from captum.attr import DeepLift, DeepLiftShap
from tangermeme.deep_lift_shap import deep_lift_shap
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxshap
from fxshap.datasets import BatchExplainer
from fxshap.errors import BatchMixingError, InputError

STEPS = 4
LENGTHS = torch.tensor([4, 2, 4, 1])


class Series(nn.Module):
    """Something of one-hot series of shape (batch, 3, steps), and a linear layer on it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.recurrent = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.summary(x.transpose(1, 2), lengths))


class Packed(Series):
    """The last state of packed series."""

    def summary(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.recurrent(pack_padded_sequence(x, lengths, True, False))[1][0]


class PaddedToLongest(Series):
    """The last of the steps of the longest series of the batch."""

    def summary(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, True, False)
        return pad_packed_sequence(self.recurrent(packed)[0], True)[0][:, -1]


class CutToLongest(Series):
    """A sum over the steps of the longest series of the batch, divided by the own length."""

    def summary(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = torch.relu(self.layer(x[:, : int(lengths.max())]))
        return h.sum(1) / lengths[:, None]


class RowByRow(Series):
    """A loop over the rows, each with its own number of steps."""

    def summary(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x))
        return torch.stack([h[i, :n].mean(0) for i, n in enumerate(lengths.tolist())])


class SelectedSteps(Series):
    """Only the steps that a mask selects are computed."""

    def summary(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        h = self.layer(x)
        out = torch.zeros_like(h)
        out[mask] = torch.tanh(h[mask])
        return out.sum(1)


class MaskedAttention(Series):
    """Attention to the steps before the end."""

    def summary(self, x: Tensor, lengths: Tensor) -> Tensor:
        outside = (torch.arange(x.shape[1]) >= lengths[:, None])[:, None]
        h = self.layer(x)
        weights = (h @ h.mT).masked_fill(outside, float("-inf")).softmax(-1)
        return (weights @ h)[:, 0]


MODELS = [Packed, PaddedToLongest, CutToLongest, RowByRow, SelectedSteps, MaskedAttention]
#: Models that compute a row in the same way whatever the other rows are.
ROWWISE = [Packed, SelectedSteps, MaskedAttention]


def one_hot(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(3, (rows, STEPS), generator=generator)
    return nn.functional.one_hot(steps, 3).transpose(1, 2).float()


SAMPLES, REFERENCES = one_hot(len(LENGTHS), 1), one_hot(3, 2)


def build(kind: type[Series]) -> fxshap.ExplainableModule:
    torch.manual_seed(0)
    return fxshap.make_explainable(kind().eval())


def one_at_a_time(model: fxshap.ExplainableModule) -> np.ndarray:
    """Return SHAP's values, with an explainer for each sample."""
    values = []
    for i in range(len(SAMPLES)):
        bound = model.bind(lengths=LENGTHS[i : i + 1])
        values.append(shap.DeepExplainer(bound, REFERENCES).shap_values(SAMPLES[i : i + 1]))
    return np.concatenate(values)


def assert_close(values: np.ndarray | Tensor, expected: np.ndarray) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(values), expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", MODELS)
def test_batched_explainer(kind):
    model = build(kind)
    expected = one_at_a_time(model)
    explainer = fxshap.DeepExplainer(model.bind(lengths=LENGTHS[:1]), REFERENCES)
    assert_close(explainer.shap_values(SAMPLES, lengths=LENGTHS), expected)


@pytest.mark.parametrize("kind", [CutToLongest, SelectedSteps])
def test_batches_of_a_data_set(kind):
    model = build(kind)
    explain = BatchExplainer(
        model.bind(lengths=LENGTHS[1:2]),
        {"x": REFERENCES.numpy()},
        inputs=["x"],
        arguments={"lengths": "n"},
    )
    batch = explain({"x": SAMPLES.numpy(), "n": LENGTHS.numpy()})
    assert_close(batch["shap_values"], one_at_a_time(model))


@pytest.mark.parametrize("kind", ROWWISE)
def test_captum_and_tangermeme(kind):
    model = build(kind)
    expected = one_at_a_time(model)[..., 1]
    by_background = DeepLiftShap(model).attribute(
        SAMPLES, REFERENCES, target=1, additional_forward_args=(LENGTHS,)
    )
    assert_close(by_background.detach(), expected)
    bound = DeepLift(model.bind(lengths=LENGTHS))
    by_pairs = [
        bound.attribute(SAMPLES, r.expand_as(SAMPLES).clone(), target=1).detach()
        for r in REFERENCES
    ]
    assert_close(torch.stack(by_pairs).mean(0), expected)
    of_characters = deep_lift_shap(
        model,
        SAMPLES,
        args=(LENGTHS,),
        references=REFERENCES.expand(len(SAMPLES), *REFERENCES.shape).clone(),
        target=1,
        device="cpu",
        batch_size=5,
    )
    assert_close(of_characters.sum(1), expected.sum(1))


def test_rows_that_python_reads_are_refused_with_a_remedy_that_works():
    model = build(RowByRow)
    with pytest.raises(BatchMixingError, match=r"explain one sample in each call"):
        DeepLiftShap(model).attribute(
            SAMPLES, REFERENCES, target=1, additional_forward_args=(LENGTHS,)
        )
    values = [
        DeepLiftShap(model)
        .attribute(x, REFERENCES, target=1, additional_forward_args=(n,))
        .detach()
        for x, n in zip(SAMPLES.split(1), LENGTHS.split(1), strict=True)
    ]
    assert_close(torch.cat(values), one_at_a_time(model)[..., 1])


def test_rows_bound_for_captums_background_are_refused_with_a_remedy():
    model = build(MaskedAttention).bind(lengths=LENGTHS)
    with pytest.raises(InputError, match="DeepLiftShap in additional_forward_args"):
        DeepLiftShap(model).attribute(SAMPLES, REFERENCES, target=1)
