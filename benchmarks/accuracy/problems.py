"""Small trained networks with their exact Shapley values, or a long estimate of them.

Tables of 12 features have exact values by brute force over 4096 coalitions. For the digits, of 64
pixels, the truth is a long run over permutations, whose own standard error is known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_wine
from torch import Tensor, nn

from fxshap.demo.network import DigitNet, load_digits
from fxshap.verification.shapley import shapley_values
from tests.networks.tables import FeatureTokenTransformer

FEATURES, REFERENCES, SAMPLES = 12, 16, 2

Array = NDArray[Any]


@dataclass
class Problem:
    """A trained network, what to explain and the truth.

    Attributes
    ----------
    name : str
    model : nn.Module
    samples, references : Tensor
    accuracy : float
        On rows that were not trained on.
    exact : ndarray
        The Shapley values, of shape (samples, features, outputs).
    error : float
        The expected distance of `exact` itself to the truth; 0 for brute force.
    """

    name: str
    model: nn.Module
    samples: Tensor
    references: Tensor
    accuracy: float
    exact: Array = field(default_factory=lambda: np.zeros(0))
    error: float = 0.0

    @property
    def features(self) -> int:
        """How many features a sample has."""
        return self.samples[0].numel()

    @property
    def outputs(self) -> int:
        """How many outputs the network has."""
        return int(self.call(self.references.flatten(1).numpy()).shape[1])

    def call(self, rows: Array) -> Array:
        """Run the network on flat rows, as the sampling explainers ask."""
        points = torch.as_tensor(rows, dtype=torch.float32).reshape(-1, *self.samples.shape[1:])
        with torch.no_grad():
            return np.concatenate([self.model(part).numpy() for part in points.split(4096)])

    def distance(self, values: Array) -> float:
        """Return the distance of attributions to the truth."""
        return float(np.abs(values - self.exact).sum() / np.abs(self.exact).sum())


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """Train on batches of 64 with Adam and a little decay of the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(steps):
        rows = torch.randperm(len(x))[:64]
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


def multilayer_perceptron(outputs: int) -> nn.Module:
    """Build a tabular network with GELUs."""
    return nn.Sequential(
        nn.Linear(FEATURES, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, outputs)
    )


class Tokens(nn.Module):
    """A transformer over one token a feature (Gorishniy et al. 2021)."""

    def __init__(self, outputs: int, width: int = 32) -> None:
        super().__init__()
        self.body = FeatureTokenTransformer(FEATURES, width)
        self.body.head[-1] = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows of numbers."""
        return self.body(x)


TABLES = {"breast cancer": load_breast_cancer, "wine": load_wine}
NETWORKS = {"GELU MLP": multilayer_perceptron, "FT-Transformer": Tokens}


def table(load: Callable[[], Any], build: Callable[[int], nn.Module], name: str) -> Problem:
    """Train on the first 12 columns of a table, and compute the exact values."""
    data = load()
    x = torch.as_tensor(data.data[:, :FEATURES], dtype=torch.float32)
    x, y = (x - x.mean(0)) / x.std(0), torch.as_tensor(data.target)
    torch.manual_seed(0)
    rows = torch.randperm(len(x))
    test, train = rows[: len(x) // 4], rows[len(x) // 4 :]
    model = fit(build(int(y.max()) + 1), x[train], y[train], 400)
    accuracy = float((model(x[test]).argmax(1) == y[test]).float().mean())
    problem = Problem(name, model, x[test][:SAMPLES], x[train][:REFERENCES], accuracy)
    double = copy.deepcopy(model).double()
    problem.exact = np.stack(
        [
            np.mean([shapley_values(double, s, r) for r in problem.references.double()], 0)
            for s in problem.samples.double()
        ]
    )
    return problem


def digits(permutations: int = 400) -> Problem:
    """Train on the digits; take the mean of a long run over permutations for the truth."""
    train_x, train_y, test_x, test_y = load_digits()
    torch.manual_seed(0)
    model = fit(DigitNet(), train_x, train_y, 300)
    accuracy = float((model(test_x).argmax(1) == test_y).float().mean())
    problem = Problem(DIGITS, model, test_x[:SAMPLES], train_x[:REFERENCES], accuracy)
    rng = np.random.default_rng(1)
    draws = np.stack([one_permutation(problem, rng) for _ in range(permutations)])
    problem.exact = draws.mean(0)
    error = draws.std(0, ddof=1) / math.sqrt(permutations)
    # The mean of |z| for a normal z of that standard error.
    problem.error = float(math.sqrt(2 / math.pi) * error.sum() / np.abs(problem.exact).sum())
    return problem


def one_permutation(problem: Problem, rng: np.random.Generator) -> Array:
    """Return what the features add in one order and its reverse, each reference in its own."""
    features = problem.features
    order = rng.random((REFERENCES, features)).argsort(1).argsort(1)  # the position of each feature
    steps = np.arange(features + 1)[:, None, None]
    references = problem.references.flatten(1).numpy()
    values = []
    for sample in problem.samples.flatten(1).numpy():
        both = []
        for position in (order, features - 1 - order):
            points = np.where(position < steps, sample, references)  # steps, references, features
            found = problem.call(points.reshape(-1, features))
            found = found.reshape(features + 1, REFERENCES, -1)
            gains = np.take_along_axis(np.diff(found, axis=0), position.T[..., None], 0)
            both.append(gains.mean(1))
        values.append(np.mean(both, 0))
    return np.stack(values)


DIGITS = "digits, CNN"
#: What is explained.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    **{
        f"{name}, {network}": partial(table, load, build, f"{name}, {network}")
        for name, load in TABLES.items()
        for network, build in NETWORKS.items()
    },
    DIGITS: digits,
}
