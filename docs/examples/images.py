"""
Images
======

A convolutional network on scikit-learn's digits: which pixels support which class.
"""

# %%
# A network
# ---------
# It is the network of ``python -m fxshap.demo``: a functional GELU, one GELU module that is called
# twice, and an in-place residual sum.

import inspect

import numpy as np
import shap
import torch

from fxshap import make_explainable
from fxshap.demo.network import DigitNet, load_digits, train

print(inspect.getsource(DigitNet))

torch.manual_seed(0)
train_x, train_y, test_x, test_y = load_digits()
model = DigitNet(channels=8)
train(model, train_x, train_y, epochs=8)

with torch.no_grad():
    right = (model(test_x).argmax(1) == test_y).float().mean()
print(f"right on {right:.1%} of {len(test_x)} test images")

# %%
# Explain
# -------
# The references are training images, so an attribution explains how this image differs from other
# digits. With one black image as reference it would explain the effect of the ink; see
# :doc:`/references`.

background = train_x[:40]
samples = torch.stack([test_x[test_y == digit][0] for digit in (0, 3, 4, 9)])

explainer = shap.DeepExplainer(make_explainable(model), background)
values = explainer.shap_values(samples)
print(values.shape)

# %%
# The last dimension counts the classes. They all add up:

with torch.no_grad():
    change = model(samples) - model(background).mean(0)
error = (torch.from_numpy(values).sum((1, 2, 3)) - change).abs().max()
print(f"largest additivity error: {error:.1e}")

# %%
# SHAP's image plot
# -----------------
# ``shap.image_plot`` takes one array for each class, with the channels last. A row is an image and
# a column is a class. Red pixels support the class, and blue pixels oppose it. The plot shows the
# classes 0, 3, 4 and 9.

shown = [0, 3, 4, 9]
by_class = [values[..., k].transpose(0, 2, 3, 1) for k in shown]
titles = np.array([[str(k) for k in shown]] * len(samples))
pictures = -samples.numpy().transpose(0, 2, 3, 1)  # dark ink on white
shap.image_plot(by_class, pictures, labels=titles, width=8, hspace=0.5)
