"""
Time series
===========

A recurrent network that reads a digit column by column: eight steps of eight channels. Recurrent
layers are one operation to PyTorch and have a rule of their own.
"""

# %%
# A series
# --------
# scikit-learn's digits, read from left to right: every column of the image is one time step, and
# its eight pixels are eight channels. It is a stand-in for a sensor with eight channels; nothing
# below depends on where the series came from.

import matplotlib.pyplot as plt
import numpy as np
import shap
import torch
import torch.nn.functional as F
from torch import nn

from fxshap import make_explainable
from fxshap.demo import load_digits

torch.manual_seed(0)
train_x, train_y, test_x, test_y = load_digits()


def as_series(images):
    return images[:, 0].transpose(1, 2).contiguous()  # (rows, steps, channels)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, series):
        states, _ = self.lstm(series)
        return self.head(states[:, -1])


model = Reader()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
series = as_series(train_x)
for _ in range(12):
    for rows in torch.randperm(len(series)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(series[rows]), train_y[rows]).backward()
        optimizer.step()

with torch.no_grad():
    right = (model(as_series(test_x)).argmax(1) == test_y).float().mean()
print(f"right on {right:.1%} of {len(test_x)} test series")

# %%
# Explain
# -------

background = series[:40]
samples = as_series(test_x[test_y == 7])[:1]

explainer = shap.DeepExplainer(make_explainable(model), background)
values = explainer.shap_values(samples)  # (rows, steps, channels, classes)

with torch.no_grad():
    owed = model(samples) - model(background).mean(0)
error = (torch.from_numpy(values).sum((1, 2)) - owed).abs().max()
print(f"attributions: {values.shape}, largest additivity error: {error:.1e}")

# %%
# The series above, and below it what each step and channel says for the class "7": red
# for it, blue against it.

of_seven = values[0, ..., 7]
largest = np.abs(of_seven).max()
figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 5), sharex=True, layout="constrained")
top.imshow(samples[0].T, cmap="gray_r", aspect="auto")
top.set(title="the series", ylabel="channel")
drawn = bottom.imshow(
    of_seven.T,
    cmap=shap.plots.colors.red_white_blue,
    vmin=-largest,
    vmax=largest,
    aspect="auto",
)
bottom.set(title="attributions for class 7", xlabel="step", ylabel="channel")
figure.colorbar(drawn, ax=bottom, label="attribution")
plt.show()

# %%
# Summed over channels an attribution belongs to a time step, and SHAP's bar plot orders the steps.
# Sums are as additive as their parts.

shap.plots.bar(
    shap.Explanation(
        of_seven.sum(1),
        base_values=explainer.expected_value[7],
        data=samples[0].sum(1).numpy(),
        feature_names=[f"step {step}" for step in range(8)],
    )
)
