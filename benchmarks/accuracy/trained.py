"""Small trained networks of 8 to 12 features: tables, digits, series and text.

Random weights are more nonlinear than the networks that people explain. The data come with
scikit-learn, except the series, which are drawn. Samples are rows that were not trained on, and
references are training rows.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import fnmatch
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn
from tqdm import tqdm

import fxshap
from benchmarks.accuracy.fidelity import (
    OUTPUT,
    TRAINED,
    network_table,
    reasons,
    summary_table,
)
from benchmarks.accuracy.measurement import METHODS, measure
from tests.networks.network import Network
from tests.networks.tables import FeatureTokenTransformer
from tests.tools.pages import replace_section

STEPS = 400


@dataclass(frozen=True)
class Data:
    """Standardised rows and their classes, or numbers to predict, in random order."""

    x: Tensor
    y: Tensor

    @property
    def outputs(self) -> int:
        """How many outputs a network for the data has."""
        return 1 if self.y.is_floating_point() else int(self.y.max()) + 1


def standardised(x: Tensor, y: Tensor) -> Data:
    """Return shuffled rows with the mean 0 and the variance 1 in every feature."""
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    return Data(x[rows].float(), y[rows])


@cache
def table(name: str, columns: int = 10) -> Data:
    """Return the first columns of one of scikit-learn's tables."""
    bunch = getattr(datasets, f"load_{name}")()
    y = torch.as_tensor(bunch.target)
    if name == "diabetes":
        y = (y - y.mean()) / y.std()
    return standardised(torch.as_tensor(bunch.data[:, :columns]), y)


@cache
def digit_images(height: int, width: int) -> Data:
    """Return the digits, averaged over patches to images of this size."""
    bunch = datasets.load_digits()
    images = torch.as_tensor(bunch.images).unsqueeze(1)
    small = F.adaptive_avg_pool2d(images, (height, width))
    return standardised(small, torch.as_tensor(bunch.target))


@cache
def waves(steps: int = 12) -> Data:
    """Draw noisy waves of three shapes: a sine, a square and a decaying sine."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (1500,), generator=generator)
    phase, frequency, noise = (torch.rand(1500, 1, generator=generator) for _ in range(3))
    time = torch.arange(steps) / steps
    angle = 6.28 * ((1 + 2 * frequency) * time + phase)
    sine = torch.sin(angle)
    shapes = torch.stack([sine, sine.sign(), sine * torch.exp(-3 * time)])
    x = shapes[y, torch.arange(1500)] + 0.3 * noise * torch.randn(1500, steps, generator=generator)
    return standardised(x.double(), y)


@cache
def paragraphs(words: int = 12) -> Data:
    """Count frequent words in windows of the texts that describe four of scikit-learn's tables."""
    names = ("breast_cancer", "diabetes", "wine", "iris")
    texts = [getattr(datasets, f"load_{name}")().DESCR.lower() for name in names]
    tokens = [re.findall(r"[a-z]{3,}", text) for text in texts]
    frequent = [word for word, _ in Counter(sum(tokens, [])).most_common(words)]
    counts, y = [], []
    for label, text in enumerate(tokens):
        for start in range(0, len(text) - 30, 3):
            window = Counter(text[start : start + 30])
            counts.append([window[word] for word in frequent])
            y.append(label)
    return standardised(torch.tensor(counts, dtype=torch.float64), torch.tensor(y))


def perceptron(
    features: int, outputs: int, *activations: nn.Module, norm: bool = False
) -> nn.Module:
    """Build layers of 32 units, with a norm before each activation if asked."""
    layers: list[nn.Module] = []
    for activation in activations:
        layers += [nn.Linear(features, 32), *([nn.LayerNorm(32)] if norm else []), activation]
        features = 32
    return nn.Sequential(*layers, nn.Linear(features, outputs))


class Gated(nn.Module):
    """Two gated linear layers with a residual, as in tables and language models."""

    def __init__(self, features: int, outputs: int, width: int = 24) -> None:
        super().__init__()
        self.embed, self.gate = nn.Linear(features, width), nn.Linear(width, 4 * width)
        self.down, self.head = nn.Linear(2 * width, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows of numbers."""
        h = self.embed(x)
        a, b = self.gate(h).chunk(2, -1)
        return self.head(F.relu(h + self.down(F.silu(a) * b)))


class Recurrent(nn.Module):
    """The last state of a recurrent layer over steps of one value."""

    def __init__(self, layer: type[nn.RNNBase], outputs: int) -> None:
        super().__init__()
        self.layer, self.head = layer(1, 16, batch_first=True), nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Take series of shape (batch, steps)."""
        return self.head(self.layer(x.unsqueeze(-1))[0][:, -1])


class Transformer(nn.Module):
    """An encoder layer over steps of one value with learned positions, and a mean."""

    def __init__(self, steps: int, outputs: int, width: int = 16) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(1, width), nn.Parameter(torch.randn(steps, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Take series of shape (batch, steps)."""
        return self.head(self.layer(self.embed(x.unsqueeze(-1)) + self.position).mean(1))


class Tokens(nn.Module):
    """A transformer over one token a feature (Gorishniy et al. 2021)."""

    def __init__(self, features: int, outputs: int, width: int = 16) -> None:
        super().__init__()
        self.body = FeatureTokenTransformer(features, width)
        self.body.head[-1] = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows of numbers."""
        return self.body(x)


def convolutions(outputs: int) -> nn.Module:
    """Build a convolutional network for images of 3 x 4."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs),
    )  # fmt: skip


def convolutions_in_time(outputs: int) -> nn.Module:
    """Build a convolutional network for series of 12 steps."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(16, outputs),
    )  # fmt: skip


@dataclass(frozen=True)
class TrainedNetwork(Network):
    """A network that is trained once.

    Parameters
    ----------
    data : callable
        Returns the data.
    """

    data: Callable[[], Data] = table

    def build(self) -> nn.Module:
        """Return a copy of the trained network, in evaluation mode."""
        return copy.deepcopy(train(self))

    def inputs(
        self, count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """Draw rows: for an odd seed those that were not trained on, for an even one the others."""
        x = self.data().x
        held_out = len(x) // 4
        rows = x[:held_out] if seed % 2 else x[held_out:]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        return (rows[order[:count]].to(dtype),)

    def score(self) -> float:
        """Return the accuracy on rows that were not trained on, or the explained variance."""
        x, y = self.data().x, self.data().y
        held_out = len(x) // 4
        model = self.build()
        with torch.no_grad():
            prediction = model(x[:held_out])
        y = y[:held_out]
        if y.is_floating_point():
            return float(1 - (prediction[:, 0] - y).square().mean() / y.var())
        return float((prediction.argmax(1) == y).float().mean())


@cache
def train(network: TrainedNetwork) -> nn.Module:
    """Train a network on three quarters of its data."""
    data = network.data()
    held_out = len(data.x) // 4
    x, y = data.x[held_out:], data.y[held_out:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network.architecture()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
        for _ in range(STEPS):
            rows = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            output = model(x[rows])
            if y.is_floating_point():
                loss = F.mse_loss(output[:, 0], y[rows].float())
            else:
                loss = F.cross_entropy(output, y[rows])
            loss.backward()
            optimizer.step()
    return model.eval()


def of(
    name: str, data: Callable[[], Data], architecture: Callable[[int, int], nn.Module]
) -> TrainedNetwork:
    """Describe a network for some data, from its numbers of features and outputs."""
    x, outputs = data().x, data().outputs
    features = x[0].numel()
    return TrainedNetwork(
        name, "trained", partial(architecture, features, outputs), (tuple(x.shape[1:]),), outputs,
        data=data,
    )  # fmt: skip


def trained_networks() -> dict[str, TrainedNetwork]:
    """Return the networks by name; each is trained at its first use."""
    cancer, wine, diabetes = (
        partial(table, "breast_cancer"),
        partial(table, "wine", 12),
        partial(table, "diabetes"),
    )
    images, rows = partial(digit_images, 3, 4), partial(digit_images, 1, 8)
    networks = (
        of("breast cancer, ReLU MLP", cancer, lambda n, k: perceptron(n, k, nn.ReLU(), nn.ReLU())),
        of("breast cancer, FT-Transformer", cancer, Tokens),
        of("wine, GELU MLP", wine, lambda n, k: perceptron(n, k, nn.GELU(), nn.GELU())),
        of("wine, gated layers", wine, Gated),
        of("diabetes, tanh MLP", diabetes, lambda n, k: perceptron(n, k, nn.Tanh(), nn.Tanh())),
        of(
            "diabetes, layer norms",
            diabetes,
            lambda n, k: perceptron(n, k, nn.SiLU(), nn.SiLU(), norm=True),
        ),
        of("digits of 3 x 4, CNN", images, lambda n, k: convolutions(k)),
        of(
            "digits of 8 columns, deep MLP",
            rows,
            lambda n, k: nn.Sequential(
                nn.Flatten(), perceptron(n, k, *(nn.ReLU() for _ in range(4)))
            ),
        ),
        of("waves, CNN", waves, lambda n, k: convolutions_in_time(k)),
        of("waves, LSTM", waves, lambda n, k: Recurrent(nn.LSTM, k)),
        of("waves, GRU", waves, lambda n, k: Recurrent(nn.GRU, k)),
        of("waves, transformer", waves, Transformer),
        of(
            "words of a text, GELU MLP",
            paragraphs,
            lambda n, k: perceptron(n, k, nn.GELU(), nn.GELU()),
        ),
    )
    return {network.name: network for network in networks}


def main() -> int:
    """Measure every method on every network, and write the tables into the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.trained", description=__doc__
    )
    parser.add_argument("--samples", type=int, default=16, help="pairs for each network")
    parser.add_argument("--networks", default="*", metavar="PATTERN", help="names, as in a shell")
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks = trained_networks()
    names = fnmatch.filter(networks, options.networks)
    methods, results, scores = list(METHODS), {}, {}
    for name in tqdm(names, unit="network"):
        scores[name] = networks[name].score()
        results[name] = measure(networks[name], methods, options.samples, timed=True)
    summary = summary_table(results, methods, "github")
    tables = [summary, network_table(results, methods, "github")]
    print(*tables, *reasons(results), sep="\n\n")
    if len(names) == len(networks):
        scored = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
        text = [
            f"`python -m benchmarks.accuracy.trained`, {datetime.date.today()}, torch "
            f"{torch.__version__}, fxshap {fxshap.__version__}. The time is that of one more pair, "
            "for all outputs, on one thread, without captures.",
            *tables,
            "Accuracy, or the explained variance of diabetes, on rows that were not trained on: "
            f"{scored}.",
            "\n".join(reasons(results)),
        ]
        replace_section(OUTPUT, TRAINED, "\n\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
