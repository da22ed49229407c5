"""The batched explainer gives the values of unmodified SHAP on the explainable model."""

import numpy as np
import pandas as pd
import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from fxshap.errors import AdditivityError, InputError, OptionError
from fxshap.runtime.attributions import PairBatches
from fxshap.runtime.engine import Engine
from tests.helpers import as_list
from tests.networks import NETWORKS

#: The largest difference, relative to the largest value.
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-12}


def by_shap(explainable: nn.Module, background: list[Tensor], samples: list[Tensor]):
    one = len(background) == 1
    explainer = shap.DeepExplainer(explainable, background[0] if one else background)
    return as_list(explainer.shap_values(samples[0] if one else samples, check_additivity=False))


def assert_close(found, expected, limit: float) -> None:
    for a, b in zip(as_list(found), expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=limit * np.abs(b).max())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_values_are_those_of_shap(name, dtype):
    network = NETWORKS[name]
    model = network.build().to(dtype)
    background = list(network.inputs(4, seed=1, dtype=dtype))
    samples = list(network.inputs(5, seed=2, dtype=dtype))
    explainable = fxshap.make_explainable(model)
    expected = by_shap(explainable, background, samples)
    for batch_size in ("auto", 3):
        explainer = fxshap.DeepExplainer(explainable, background, batch_size=batch_size)
        # Rounding differs between batch sizes; networks that magnify it get its bound.
        limit = max(LIMITS[dtype], 10 * rounding(model, samples, dtype))
        assert_close(explainer.shap_values(samples), expected, limit)


def rounding(model: nn.Module, samples: list[Tensor], dtype: torch.dtype) -> float:
    """How far the output of a row changes with the size of its batch, relative to the largest."""
    with torch.no_grad():
        together = model(*samples)
        single = torch.cat([model(*(x[i : i + 1] for x in samples)) for i in range(len(together))])
    return float((together - single).abs().max() / together.abs().max())


@pytest.mark.parametrize(
    "options",
    [{"rule": "variance"}, {"refine": 1}, {"refine": fxshap.Refinement(2, seed=3)}],
    ids=["variance", "refine", "seed"],
)
def test_every_option_gives_the_values_of_shap(options):
    network = NETWORKS["encoder_layer_batch_first_relu"]
    model = network.build().double()
    background = list(network.inputs(4, seed=1, dtype=torch.float64))
    samples = list(network.inputs(3, seed=2, dtype=torch.float64))
    expected = by_shap(fxshap.make_explainable(model, **options), background, samples)
    explainer = fxshap.DeepExplainer(model, background, **options)
    assert_close(explainer.shap_values(samples), expected, 1e-12)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval()


BACKGROUND, SAMPLES = torch.randn(6, 4), torch.randn(5, 4)


def test_an_explanation_is_complete(model):
    table = pd.DataFrame(SAMPLES.double().numpy(), columns=list("abcd"))
    background = pd.DataFrame(BACKGROUND.double().numpy(), columns=list("abcd"))
    explainer = fxshap.DeepExplainer(model, background, output_names=["x", "y", "z"])
    explanation = explainer(table)
    assert explanation.values.shape == (5, 4, 3)
    assert explanation.feature_names == list("abcd")
    assert explanation.output_names == ["x", "y", "z"]
    np.testing.assert_array_equal(explanation.data, table.to_numpy())
    f_x = model(SAMPLES).detach().numpy()
    np.testing.assert_allclose(explanation.values.sum(1) + explanation.base_values, f_x, atol=1e-6)
    np.testing.assert_allclose(explainer.expected_value, explanation.base_values[0])


def test_names_of_outputs_are_those_of_the_columns(model):
    explainer = fxshap.DeepExplainer(model, BACKGROUND, output_names=["x", "y", "z"])
    assert explainer(SAMPLES, outputs=[2, 0, 1]).output_names == ["z", "x", "y"]
    assert explainer(SAMPLES, outputs=[1]).output_names == ["y"]
    of_each_row = [[0, 1], [1, 0], [0, 1], [0, 1], [2, 1]]
    assert not {"x", "y", "z"} & set(explainer(SAMPLES, outputs=of_each_row).output_names or ())


def test_data_is_what_the_explanation_shows(model):
    explainer = fxshap.DeepExplainer(model, BACKGROUND)
    words = [["a", "b", "c", "d"], ["e", "f", "g", "h"]]
    explanation = explainer(SAMPLES[:2], data=words)
    np.testing.assert_array_equal(explanation.data, words)
    with pytest.raises(InputError, match="data has 1 rows for 2 samples"):
        explainer(SAMPLES[:2], data=words[:1])


def test_one_output_has_the_shape_of_the_input(model):
    explainer = fxshap.DeepExplainer(nn.Sequential(model, nn.Linear(3, 1)), BACKGROUND)
    explanation = explainer(SAMPLES)
    assert explanation.values.shape == (5, 4) and explanation.base_values.shape == (5,)
    shap.plots.waterfall(explanation[0], show=False)
    assert explainer.shap_values(SAMPLES).shape == (5, 4, 1)


@pytest.mark.parametrize("order", ["max", "min", "max_abs"])
def test_ranked_outputs_are_those_of_shap(model, order):
    explainable = fxshap.make_explainable(model)
    values, ranks = shap.DeepExplainer(explainable, BACKGROUND).shap_values(
        SAMPLES, ranked_outputs=2, output_rank_order=order, check_additivity=False
    )
    found, columns = fxshap.DeepExplainer(explainable, BACKGROUND).shap_values(
        SAMPLES, ranked_outputs=2, output_rank_order=order
    )
    np.testing.assert_array_equal(columns, ranks)
    np.testing.assert_allclose(found, values, atol=1e-6)


def test_chosen_outputs_are_columns_of_all(model):
    explainer = fxshap.DeepExplainer(model, BACKGROUND)
    everything = explainer.shap_values(SAMPLES)
    np.testing.assert_allclose(
        explainer.shap_values(SAMPLES, outputs=[2, 0]), everything[..., [2, 0]], atol=1e-6
    )
    targets = np.array([[0], [1], [2], [1], [0]])
    expected = np.take_along_axis(everything, targets[:, None], -1)
    np.testing.assert_allclose(explainer.shap_values(SAMPLES, outputs=targets), expected, atol=1e-6)


class Masked(nn.Module):
    """Attention-like pooling of tokens where a mask is True."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.embeddings(ids))
        if mask is not None:
            h = h * mask[:, :, None]
        return self.head(h.sum(1) ** 2)


def test_arguments_with_a_row_for_each_sample_are_paired_with_it():
    torch.manual_seed(0)
    model = Masked().eval()
    ids, nothing = torch.randint(1, 10, (3, 5)), torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    explainer = fxshap.DeepExplainer(model, nothing, layer="embeddings", batch_size=2)
    values = explainer.shap_values(ids, mask=mask)
    embed, suffix = fxshap.make_explainable(model).split_at("embeddings")
    for row in range(3):
        one = suffix.bind(ids=ids[row : row + 1], mask=mask[row : row + 1])
        expected = shap.DeepExplainer(one, embed(nothing)).shap_values(embed(ids[row : row + 1]))
        np.testing.assert_allclose(values[row : row + 1], expected, atol=1e-6)
    assert not values[1, 3:].any()


def test_data_sets_and_loaders(model):
    explainer = fxshap.DeepExplainer(model, BACKGROUND)
    expected = explainer.shap_values(SAMPLES)
    data = torch.utils.data.TensorDataset(SAMPLES)
    np.testing.assert_array_equal(explainer.shap_values(data), expected)
    labelled = torch.utils.data.TensorDataset(SAMPLES, torch.arange(5))
    loader = torch.utils.data.DataLoader(labelled, batch_size=2)
    parts = [part.values for part in explainer.iter_batches(loader)]
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-6)


def test_targets_of_a_loader_are_left_out(model):
    explainer = fxshap.DeepExplainer(model, BACKGROUND)
    labelled = torch.utils.data.TensorDataset(SAMPLES, torch.arange(5))
    expected = explainer.shap_values(SAMPLES)
    np.testing.assert_array_equal(explainer.shap_values(labelled), expected)
    with pytest.raises(InputError, match="inputs or targets"):
        fxshap.DeepExplainer(model, labelled)


def test_stacked_references_stay_within_reference_batch_size(model, monkeypatch):
    sizes = []
    explain = PairBatches.explain

    def noted(self, samples, columns):
        sizes.append(len(samples[0]))
        return explain(self, samples, columns)

    monkeypatch.setattr(PairBatches, "explain", noted)
    fxshap.DeepExplainer(model, BACKGROUND, reference_batch_size=12).shap_values(SAMPLES)
    assert sizes == [1, 1, 2, 2, 2]  # the first two measure how large a pair is


@pytest.mark.parametrize(("total", "batch"), [(1, 1), (4, 4), (7, 4), (9, 3), (11, 4)])
def test_one_tape_serves_all_batches_and_calls(model, monkeypatch, total, batch):
    samples = torch.randn(total, *SAMPLES.shape[1:])
    expected = fxshap.DeepExplainer(model, BACKGROUND, batch_size=1).shap_values(samples)
    explainer = fxshap.DeepExplainer(model, BACKGROUND, batch_size=4)
    tapes = []
    record = Engine.record

    def noted(self, inputs, *arguments):
        tapes.append(len(inputs[0]))
        return record(self, inputs, *arguments)

    monkeypatch.setattr(Engine, "record", noted)
    for _ in range(2):
        values = explainer.shap_values(samples)
        np.testing.assert_allclose(values, expected, atol=1e-6)
    assert tapes == [batch * len(BACKGROUND)]


def test_the_users_model_keeps_its_mode(model):
    model.train()
    fxshap.DeepExplainer(model, BACKGROUND).shap_values(SAMPLES)
    assert model.training


def test_out_of_memory_halves_the_batch(model, monkeypatch):
    expected = fxshap.DeepExplainer(model, BACKGROUND).shap_values(SAMPLES)
    explain = PairBatches.explain
    sizes = []

    def small_only(self, samples, columns):
        sizes.append(len(samples[0]))
        if len(samples[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return explain(self, samples, columns)

    monkeypatch.setattr(PairBatches, "explain", small_only)
    explainer = fxshap.DeepExplainer(model, BACKGROUND, batch_size=5)
    np.testing.assert_allclose(explainer.shap_values(SAMPLES), expected, atol=1e-6)
    assert sizes == [5, 2, 2, 2]


class Sum(nn.Module):
    """Two inputs to two outputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x[:, :2] + y[:, 2:])


@pytest.mark.parametrize(
    ("result", "message"),
    [(lambda x: {"logits": x}, "choose the tensor"), (lambda x: x[..., None], "shape")],
    ids=["dict", "three dimensions"],
)
def test_outputs_are_checked_as_for_shap(result, message):
    class Model(nn.Module):
        def forward(self, x):
            return result(torch.tanh(x))

    with pytest.raises(fxshap.OutputError, match=message):
        fxshap.DeepExplainer(Model(), BACKGROUND)


def test_bad_input_is_refused_before_work_begins(model):
    explainer = fxshap.DeepExplainer(model, BACKGROUND)
    with pytest.raises(InputError, match=r"rows of input 0 have the shape \(4,\)"):
        explainer.shap_values(torch.randn(2, 5))
    both = fxshap.DeepExplainer(Sum(), [BACKGROUND, BACKGROUND])
    with pytest.raises(InputError, match=r"the inputs have the shapes \(5, 4\), \(4, 4\)"):
        both.shap_values([SAMPLES, SAMPLES[:4]])
    with pytest.raises(InputError, match="has no rows"):
        explainer.shap_values(torch.randn(0, 4))
    with pytest.raises(InputError, match="outputs 0 to 2"):
        explainer.shap_values(SAMPLES, outputs=[3])
    with pytest.raises(InputError, match=r"NaN or infinity \(row 1\)"):
        explainer.shap_values(torch.tensor([[0.0] * 4, [float("nan")] * 4]))
    with pytest.raises(OptionError, match="explainable already"):
        fxshap.DeepExplainer(fxshap.make_explainable(model), BACKGROUND, rule="variance")


def test_attributions_that_do_not_sum_up_are_an_error(model, monkeypatch):
    mean = PairBatches._mean
    monkeypatch.setattr(PairBatches, "_mean", lambda *args: 1.1 * mean(*args))
    explainer = fxshap.DeepExplainer(model, BACKGROUND)
    with pytest.raises(AdditivityError, match="fxshap.verify"):
        explainer.shap_values(SAMPLES)
    assert explainer.shap_values(SAMPLES, check_additivity=False).shape == (5, 4, 3)


class Recurrent(nn.Module):
    """Two bidirectional layers over series of different lengths, from a state of each series."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = layer(3, 4, 2, batch_first=True, bidirectional=True)
        self.state, self.head = nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor, lengths: Tensor, varies: Tensor) -> Tensor:
        first = self.state(torch.where(varies[:, None], x[:, 0], 1.0)).expand(4, -1, -1)
        state = (first, first) if isinstance(self.layer, nn.LSTM) else first
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed, state)[0], True)
        return self.head(out[:, 0] + out[:, -1])


@pytest.mark.parametrize(
    "layer, rule",
    [(nn.LSTM, "rescale"), (nn.LSTM, "variance"), (nn.GRU, "rescale"), (nn.RNN, "rescale")],
)
def test_stacked_series_of_different_lengths_are_those_of_one_at_a_time(layer, rule):
    torch.manual_seed(0)
    model = Recurrent(layer)
    background, samples = torch.randn(3, 6, 3), torch.randn(4, 6, 3)
    arguments = {
        "lengths": torch.tensor([6, 2, 6, 2]),
        "varies": torch.tensor([True, False, True, False]),
    }
    bound = {name: value[:1] for name, value in arguments.items()}
    one, many = (
        fxshap.DeepExplainer(
            model, background, forward_kwargs=bound, rule=rule, batch_size=size
        ).shap_values(samples, **arguments)
        for size in (1, 4)
    )
    np.testing.assert_allclose(many, one, rtol=0, atol=1e-6 * np.abs(one).max())
