"""
One-hot sequences
=================

A network for DNA like BPNet (Avsec et al. 2021), with dilated convolutions and residual sums. Each
position is one feature, and the references are shuffles of the sequence.
"""

# %%
# Sites whose motif is known
# --------------------------
# CRP is a protein of *Escherichia coli* that binds to DNA. RegulonDB (Salgado et al. 2013) lists
# its sites of 26 nucleotides, and the package ``logomaker`` contains the list. The motif is known:
# ``TGTGA``, six less important nucleotides, and ``TCACA``. So we know what an explanation should
# find.
#
# The network separates sites from shuffles of sites, which have the same nucleotides in another
# order. Sites that are listed twice, or on both strands, are used once, so that no site is in both
# sets.

import logomaker
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import shap
import torch
import torch.nn.functional as F
from torch import nn

from fxshap import Refinement, make_explainable

LETTERS = "ACGT"
MOTIF = [*range(5, 10), *range(16, 21)]  # where the sites have TGTGA and TCACA
generator = np.random.default_rng(0)
torch.manual_seed(0)

with logomaker.open_example_datafile("crp_sites.fa", print_description=False) as file:
    listed = [line.strip() for line in file if line[0] in LETTERS]

complement = str.maketrans("ACGT", "TGCA")
sites = {min(site, site.translate(complement)[::-1]): site for site in listed}.values()
codes = generator.permutation([[LETTERS.index(letter) for letter in site] for site in sites])
test, train = codes[:60], codes[60:]


def one_hot(codes):
    return F.one_hot(torch.from_numpy(codes), 4).transpose(1, 2).float()  # (rows, 4, length)


def shuffled(codes):
    return generator.permuted(codes, axis=1)


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
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-3)
labels = torch.tensor([1.0] * 64 + [0.0] * 64)[:, None]
for _ in range(200):
    rows = train[generator.integers(len(train), size=64)]
    inputs = one_hot(np.concatenate([rows, shuffled(rows)]))
    optimizer.zero_grad()
    F.binary_cross_entropy_with_logits(model(inputs), labels).backward()
    optimizer.step()

with torch.no_grad():
    recognised = (model(one_hot(test)) > 0).float().mean()
    refused = (model(one_hot(shuffled(np.tile(test, (10, 1))))) <= 0).float().mean()
print(f"{len(train)} sites to learn from; of {len(test)} new ones {recognised:.0%} are recognised,")
print(f"and of their shuffles {refused:.0%} are refused")

# %%
# Explain
# -------
# ``DeepExplainer`` takes one background for all samples. The references of a sequence are shuffles
# of that sequence, so each sequence has its own explainer. All explainers share one capture.
#
# The refinement draws coalitions of features. ``feature_dims=(2,)`` makes each position one
# feature. The attribution of a position is the sum over the four channels.

explainable = make_explainable(model, refine=Refinement(2, feature_dims=(2,)))


def explain(site):
    sequence, shuffles = one_hot(site[None]), one_hot(shuffled(np.tile(site, (20, 1))))
    values = shap.DeepExplainer(explainable, shuffles).shap_values(sequence)
    with torch.no_grad():
        change = (model(sequence) - model(shuffles).mean(0)).item()
    return values[0, ..., 0].sum(0), abs(values.sum() - change)


explained = test[:20]
values, errors = map(np.array, zip(*map(explain, explained), strict=True))
print(f"attributions: {values.shape}, largest additivity error: {errors.max():.1e}")

# %%
# The sequences are drawn as logos, in which the height of a nucleotide is its attribution. The grey
# bands mark the known motif.

figure, axes = plt.subplots(3, 1, figsize=(9, 6), sharey=True, layout="constrained")
for ax, site, by_position in zip(axes, explained, values, strict=False):
    heights = np.eye(4)[site] * by_position[:, None]
    logomaker.Logo(pd.DataFrame(heights, columns=list(LETTERS)), ax=ax, show_spines=False)
    for start in (5, 16):
        ax.axvspan(start - 0.5, start + 4.5, color="0.92", zorder=-2)
    ax.set_xticks([])
figure.supylabel("attribution")
plt.show()

# %%
# SHAP's bar plot shows the mean over all twenty sites. The sites are aligned, so a position is the
# same feature in all of them:

consensus = "     TGTGA      TCACA     "
shap.plots.bar(
    shap.Explanation(
        values,
        data=explained,
        feature_names=[f"{at + 1} {letter}" for at, letter in enumerate(consensus)],
    ),
    max_display=13,
)

# %%
# The share of the attribution on the ten positions of the motif, out of twenty-six:

inside = np.abs(values[:, MOTIF]).sum() / np.abs(values).sum()
print(f"{inside:.0%}")
