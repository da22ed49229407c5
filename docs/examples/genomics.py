"""
One-hot sequences
=================

A network in the manner of BPNet (Avsec et al. 2021) that looks for a motif in DNA: dilated
convolutions with residual sums. The letters of a position are one feature, and the references are
shuffles of the sequence.
"""

# %%
# A task whose answer is known
# ----------------------------
# The data are synthetic: random sequences of 60 letters. Half of them hold the motif ``TGACTCA`` at
# a random place, and the label says whether it is there. So we know what an explanation should
# find.

import matplotlib.pyplot as plt
import numpy as np
import shap
import torch
import torch.nn.functional as F
from torch import nn

from fxshap import make_explainable

LETTERS, MOTIF, LENGTH = "ACGT", "TGACTCA", 60
generator = np.random.default_rng(0)
torch.manual_seed(0)


def draw(rows):
    codes = generator.integers(4, size=(rows, LENGTH))
    labels = np.arange(rows) % 2
    starts = generator.integers(10, LENGTH - 10 - len(MOTIF), size=rows)
    for row in np.flatnonzero(labels):
        codes[row, starts[row] : starts[row] + len(MOTIF)] = [LETTERS.index(c) for c in MOTIF]
    return codes, torch.from_numpy(labels[:, None]).float(), starts


def one_hot(codes):
    return F.one_hot(torch.from_numpy(codes), 4).transpose(1, 2).float()  # (rows, 4, length)


class MotifNet(nn.Module):
    def __init__(self, channels=16):
        super().__init__()
        self.stem = nn.Conv1d(4, channels, 7, padding=3)
        self.dilated = nn.ModuleList(
            nn.Conv1d(channels, channels, 3, padding=2**k, dilation=2**k) for k in (1, 2)
        )
        self.head = nn.Linear(channels, 1)

    def forward(self, sequence):
        hidden = F.relu(self.stem(sequence))
        for layer in self.dilated:
            hidden = hidden + F.relu(layer(hidden))
        return self.head(hidden.amax(2))


model = MotifNet()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(250):
    codes, labels, _ = draw(64)
    optimizer.zero_grad()
    F.binary_cross_entropy_with_logits(model(one_hot(codes)), labels).backward()
    optimizer.step()

test_codes, test_labels, starts = draw(500)
with torch.no_grad():
    right = ((model(one_hot(test_codes)) > 0) == test_labels.bool()).float().mean()
print(f"right on {right:.1%} of 500 new sequences")

# %%
# Explain
# -------
# ``DeepExplainer`` takes one background for all samples. The references of a sequence are shuffles
# of it, so each sequence gets an explainer of its own; the capture is made once and kept.
#
# A position is one feature, whatever its letter: ``feature_dims=(2,)`` says so to the refinement,
# which draws its coalitions among features. An attribution of a position is the sum over its
# letters.

explainable = make_explainable(model, refine=2, feature_dims=(2,))


def explain(row):
    sequence = one_hot(test_codes[row : row + 1])
    shuffles = one_hot(np.stack([generator.permutation(test_codes[row]) for _ in range(20)]))
    values = shap.DeepExplainer(explainable, shuffles).shap_values(sequence)
    with torch.no_grad():
        owed = (model(sequence) - model(shuffles).mean(0)).item()
    return values[0, ..., 0].sum(0), abs(values.sum() - owed)


explained = [1, 3, 5]
found = {row: explain(row) for row in explained}
print(f"largest additivity error: {max(error for _, error in found.values()):.1e}")

# %%
# The bars are the positions; the grey band is where the motif was planted.

figure, axes = plt.subplots(len(explained), 1, figsize=(9, 6), sharey=True, layout="constrained")
for ax, (row, (by_position, _)) in zip(axes, found.items(), strict=True):
    ax.axvspan(starts[row] - 0.5, starts[row] + len(MOTIF) - 0.5, color="0.9")
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.bar(range(LENGTH), by_position, color=np.where(by_position > 0, "#ff0051", "#008bfb"))
    ax.set_xticks(range(LENGTH), [LETTERS[code] for code in test_codes[row]], fontsize=8)
    ax.tick_params(length=0)
    ax.margins(x=0.005)
figure.supylabel("attribution")
plt.show()

# %%
# How much of the attribution lies on the motif:

for row, (by_position, _) in found.items():
    inside = np.abs(by_position[starts[row] : starts[row] + len(MOTIF)]).sum()
    print(f"sequence {row}: {inside / np.abs(by_position).sum():.0%} of it")
