"""
SHAP's plots
============

Every plot of SHAP that takes an ``Explanation``, from one explainable model. The result of
``explainer(samples)`` has no base values and feature names, for any model. Three lines add them.
"""

# %%
# A network and its explanation
# -----------------------------

import matplotlib.pyplot as plt
import numpy as np
import shap
import torch
from sklearn.datasets import load_digits, load_wine
from torch import nn

from fxshap import make_explainable

torch.manual_seed(0)


def train(model, features, labels, steps=200):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(features), labels).backward()
        optimizer.step()
    return model.eval()


wine = load_wine(as_frame=True)
frame = (wine.data - wine.data.mean()) / wine.data.std()
features = torch.tensor(frame.to_numpy(), dtype=torch.float32)
model = train(
    nn.Sequential(nn.Linear(13, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 3)),
    features,
    torch.tensor(wine.target.to_numpy()),
)

explainer = shap.DeepExplainer(make_explainable(model), features[::4])
explanation = explainer(features)
explanation.base_values = np.tile(explainer.expected_value, (len(frame), 1))
explanation.data = wine.data.to_numpy()
explanation.feature_names = list(frame.columns)
print(explanation.shape)  # (samples, features, outputs)

# %%
# Many samples: beeswarm, bar, heatmap, scatter
# ---------------------------------------------
# Each looks at one output, here the first kind of wine.

first = explanation[..., 0]
shap.plots.beeswarm(first, show=False)
plt.show()

# %%

shap.plots.bar(first, show=False)
plt.show()

# %%

shap.plots.heatmap(first, show=False)
plt.show()

# %%

shap.plots.scatter(first[:, "proline"], color=first, show=False)
plt.show()

# %%
# One sample: waterfall, force, decision
# --------------------------------------

shap.plots.waterfall(first[0], show=False)
plt.show()

# %%

shap.plots.force(first[0], matplotlib=True, contribution_threshold=0.08, show=False)
plt.show()

# %%

shap.plots.decision(
    first.base_values[0], first.values[:20], feature_names=first.feature_names, show=False
)
plt.show()

# %%
# Images
# ------
# The image plot wants the channels last.

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
network = train(
    nn.Sequential(nn.Conv2d(1, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(288, 10)),
    images,
    torch.tensor(digits.target),
    steps=60,
)
pixels = shap.DeepExplainer(make_explainable(network), images[::40]).shap_values(images[:3])
shap.plots.image(
    shap.Explanation(
        np.moveaxis(pixels, 1, 3)[..., :4],
        data=np.moveaxis(images[:3].numpy(), 1, 3),
        output_names=["0", "1", "2", "3"],
    ),
    show=False,
)
plt.show()

# %%
# Words
# -----
# The text plot takes one number a token. The guide to :doc:`text <text>` has it on real weights.
