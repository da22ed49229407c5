"""
Tabular data
============

A classifier of tumours from thirty measured features, with the activation that started this
library: GELU, called as a function.
"""

# %%
# A network
# ---------
# scikit-learn's breast cancer data are 569 rows of thirty features. The network calls ``F.gelu``,
# an operation that hooks on modules cannot see.

import numpy as np
import shap
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn

from fxshap import make_explainable

torch.manual_seed(0)
data = load_breast_cancer()
benign = data.target[:, None].astype(np.float32)
train_x, test_x, train_y, test_y = train_test_split(
    data.data, benign, test_size=0.25, random_state=0, stratify=data.target
)
scaler = StandardScaler().fit(train_x)


def tensor(features):
    return torch.from_numpy(scaler.transform(features)).float()


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(30, 32)
        self.second = nn.Linear(32, 32)
        self.head = nn.Linear(32, 1)

    def forward(self, features):
        hidden = F.gelu(self.first(features))
        hidden = hidden + F.gelu(self.second(hidden))
        return self.head(hidden)


model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-3)
labels = torch.from_numpy(train_y)
for _ in range(150):
    optimizer.zero_grad()
    F.binary_cross_entropy_with_logits(model(tensor(train_x)), labels).backward()
    optimizer.step()

with torch.no_grad():
    right = ((model(tensor(test_x)) > 0).numpy() == test_y).mean()
print(f"right on {right:.1%} of {len(test_x)} test rows")

# %%
# Stock SHAP
# ----------
# SHAP checks that the attributions of a row add up to the difference of the outputs. Here they do
# not, and it raises an error.

background = tensor(train_x)[:100]
samples = tensor(test_x)[:60]

try:
    shap.DeepExplainer(model, background).shap_values(samples)
except AssertionError as error:
    print(f"AssertionError: {str(error)[:68]}...")

# %%
# The same, made explainable
# --------------------------
# This takes one more line. The check stays on.

explainable = make_explainable(model)
explainer = shap.DeepExplainer(explainable, background)
values = explainer.shap_values(samples)

with torch.no_grad():
    change = model(samples) - model(background).mean(0)
error = (torch.from_numpy(values).sum(1) - change).abs().max()
print(f"attributions: {values.shape}, largest additivity error: {error:.1e}")

# %%
# SHAP's plots
# ------------
# SHAP's plots take an ``Explanation``. Its ``data`` are for the reader: the features in their own
# units, not the standardised ones.

explanation = shap.Explanation(
    values[..., 0],
    base_values=np.full(len(samples), explainer.expected_value[0]),
    data=test_x[:60],
    feature_names=[str(name) for name in data.feature_names],
)
shap.plots.beeswarm(explanation, max_display=12)

# %%
# Each dot is one tumour. To the right of the line a feature supports "benign"; the colour is the
# value of the feature. One row in detail:

shap.plots.waterfall(explanation[0], max_display=10)
