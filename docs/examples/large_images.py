"""
Large images
============

A ResNet and a vision transformer on images of 224 x 224, explained by pixels, by patches and by
superpixels. Their weights are random, so the pictures show how it is done, not what a trained
network sees.
"""

# %%
# Two networks and an image
# -------------------------
# The networks are those of ``transformers``, in the sizes of ResNet-18 and ViT-Tiny. To explain
# trained ones, replace ``ResNetForImageClassification(config)`` by
# ``ResNetForImageClassification.from_pretrained(...)``; the networks of torchvision and timm work
# in the same way.

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_image
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import fxshap

torch.manual_seed(0)
CLASSES = 10
resnet = ResNetForImageClassification(
    ResNetConfig(
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
).eval()
vit = ViTForImageClassification(
    ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        num_labels=CLASSES,
    )
).eval()

photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None] / 255
image = F.interpolate(photo[..., 100:420], size=(224, 224), mode="bilinear", antialias=True)

# %%
# References
# ----------
# A blurred copy and a grey image: compared with them, an attribution is the effect of the visible
# content. See :doc:`choosing references </references>`.

blurred = F.avg_pool2d(F.pad(image, (24,) * 4, mode="reflect"), 49, stride=1)
background = torch.cat([blurred, torch.full_like(image, 0.5)])

# %%
# Explain one class
# -----------------
# ``output="logits"`` selects the tensor that the networks return in an object. Only the class with
# the largest logit is explained, which saves time where there are a thousand.


def explain(network, **options):
    explainer = fxshap.DeepExplainer(network, background, output="logits", **options)
    with torch.no_grad():
        logits = network(image).logits
        change = logits.max() - network(background).logits.mean(0)[logits.argmax()]
    values = explainer.shap_values(image, outputs=[int(logits.argmax())])  # (1, 3, 224, 224, 1)
    print(f"{type(network).__name__}: additivity error {abs(values.sum() - change):.1e}")
    return torch.from_numpy(values[0, ..., 0]).sum(0)  # a pixel is the sum of its channels


pixels = {"ResNet": explain(resnet), "ViT": explain(vit)}

# %%
# Patches
# -------
# Single pixels are noisy. Attributions are additive, so a patch is the sum of its pixels, and all
# patches still sum to the difference of the outputs.


def by_patch(values, size=16):
    return F.avg_pool2d(values[None, None], size)[0, 0] * size**2


# %%
# Superpixels
# -----------
# A superpixel is a region of one colour. Here it is a cluster of colours and positions, as in SLIC
# (Achanta et al. 2012); ``skimage.segmentation.slic`` gives such numbers, too.

rows, columns = np.mgrid[:224, :224] / 224
features = np.stack([*image[0].numpy(), rows, columns], -1)
coarse = features[::4, ::4].reshape(-1, 5)
clusters = KMeans(24, n_init=1, random_state=0).fit(coarse)
superpixels = torch.from_numpy(clusters.predict(features.reshape(-1, 5)).reshape(224, 224)).long()


def by_superpixel(values):
    sums = torch.bincount(superpixels.flatten(), weights=values.flatten())
    return sums[superpixels]


# %%
# The first row shows pixels, patches and superpixels of the ResNet, and the second those of the
# ViT. Red supports the class, and blue opposes it.

figure, axes = plt.subplots(2, 4, figsize=(11, 5.6), layout="constrained")
for line, (name, values) in zip(axes, pixels.items(), strict=True):
    line[0].imshow(image[0].permute(1, 2, 0))
    line[0].set_ylabel(name)
    kinds = {"pixels": values, "patches": by_patch(values), "superpixels": by_superpixel(values)}
    for ax, (kind, shown) in zip(line[1:], kinds.items(), strict=True):
        limit = np.quantile(shown.abs().numpy(), 0.995)
        ax.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set_title(kind)
for ax in axes.flat:
    ax.set_xticks([])
    ax.set_yticks([])
plt.show()

# %%
# Nearer to the Shapley values of regions
# ---------------------------------------
# With ``feature_mask=`` a region is one feature, and refinement draws coalitions of regions. One
# pair of coalitions takes two to five times as long as one pass, and adds up as well.

refinement = fxshap.Refinement(1, feature_mask=superpixels)
refined = explain(vit, refine=refinement)
one_pass, better = (by_superpixel(values) for values in (pixels["ViT"], refined))
print(f"correlation with one pass: {np.corrcoef(one_pass.flatten(), better.flatten())[0, 1]:.2f}")
