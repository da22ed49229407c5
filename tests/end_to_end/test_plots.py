"""Every plot of SHAP that takes an explanation draws one of an explainable model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import shap
import torch
from torch import nn

import fxshap

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NAMES = ["age", "height", "weight", "pulse"]

#: From an explanation of many samples and one output to a plot.
PLOTS_OF_MANY: dict[str, Callable[[Any], Any]] = {
    "beeswarm": lambda e: shap.plots.beeswarm(e, show=False),
    "bar": lambda e: shap.plots.bar(e, show=False),
    "violin": lambda e: shap.plots.violin(e, show=False),
    "heatmap": lambda e: shap.plots.heatmap(e, show=False),
    "decision": lambda e: shap.plots.decision(
        e.base_values[0], e.values, features=e.data, feature_names=e.feature_names, show=False
    ),
}

#: From an explanation of one sample and one output to a plot.
PLOTS_OF_ONE: dict[str, Callable[[Any], Any]] = {
    "bar": lambda e: shap.plots.bar(e, show=False),
    "waterfall": lambda e: shap.plots.waterfall(e, show=False),
    "force": lambda e: shap.plots.force(e, matplotlib=True, show=False, contribution_threshold=0),
}


@pytest.fixture(autouse=True)
def no_figure_is_left() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def explanation() -> shap.Explanation:
    """Of a table, as its users hold it: pandas in, column names on."""
    torch.manual_seed(0)
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 4)), columns=NAMES)
    rows = torch.tensor(table.to_numpy(), dtype=torch.float32)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    explainer = shap.DeepExplainer(fxshap.make_explainable(model), rows[:5])
    # DeepExplainer's own Explanation lacks the data and the names of the table.
    return shap.Explanation(
        explainer(rows).values,
        np.tile(explainer.expected_value, (len(rows), 1)),
        table.to_numpy(),
        feature_names=list(table.columns),
    )


def texts() -> list[str]:
    """Every text in the figure that was drawn, and on its axes."""
    found = plt.gcf().findobj(matplotlib.text.Text)
    return [text.get_text() for text in found if text.get_text()]


@pytest.mark.parametrize("name", PLOTS_OF_MANY)
def test_many_samples_are_drawn(explanation, name):
    PLOTS_OF_MANY[name](explanation[:, :, 0])
    plt.gcf().canvas.draw()
    assert set(NAMES) <= set(texts())


@pytest.mark.parametrize("name", PLOTS_OF_ONE)
def test_one_sample_is_drawn(explanation, name):
    PLOTS_OF_ONE[name](explanation[0, :, 0])
    plt.gcf().canvas.draw()
    assert all(any(feature in text for text in texts()) for feature in NAMES)


def test_features_are_scattered(explanation):
    shap.plots.scatter(explanation[:, "pulse", 0], show=False)
    plt.gcf().canvas.draw()
    assert "pulse" in texts()


def test_images_are_drawn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    images = torch.rand(6, 1, 8, 8)
    explainer = shap.DeepExplainer(fxshap.make_explainable(model), images[:4])
    found = explainer(images[4:])
    # One output, the channels last: (images, height, width, channels).
    values = np.moveaxis(found.values[..., 0], 1, 3)
    pixels = np.moveaxis(images[4:].numpy(), 1, 3)
    shap.plots.image(shap.Explanation(values, data=pixels), show=False)
    plt.gcf().canvas.draw()
    drawn = [np.asarray(image.get_array()) for axes in plt.gcf().axes for image in axes.images]
    for expected in values[..., 0]:
        assert any(x.shape == (8, 8) and np.allclose(x, expected) for x in drawn)


def test_texts_are_drawn():
    torch.manual_seed(0)

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids):
            return self.head(torch.tanh(self.embedding(ids)).sum(1))

    embed, head = fxshap.make_explainable(Bag()).split_at("embedding")
    ids, nothing = torch.tensor([[3, 1, 4]]), torch.tensor([[0, 0, 0]])
    explainer = shap.DeepExplainer(head.bind(ids=ids), embed(nothing))
    values = explainer(embed(ids)).values.sum(2)  # tokens, outputs
    words = np.array([["plots ", "of ", "words"]], dtype=object)
    base = np.tile(explainer.expected_value, (1, 1))
    page = shap.plots.text(shap.Explanation(values, base, words)[:, :, 0], display=False)
    assert all(word.strip() in page for word in words[0])
