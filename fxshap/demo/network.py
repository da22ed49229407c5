"""The network of the demo and its data."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


class DigitNet(nn.Module):
    """An ordinary network, not written for attribution.

    It has a functional GELU, one GELU module that is called twice and an in-place residual sum.
    Hooks on modules miss the functional operations and confuse the two calls of one module.
    """

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.activation = nn.GELU()
        self.head = nn.Linear(channels * 4 * 4, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Map images of shape (batch, 1, 8, 8) to one logit per class."""
        identity = F.gelu(self.stem(image))
        out = self.activation(self.conv1(identity))
        out = F.gelu(self.conv2(out))
        out += identity
        out = self.activation(self.conv3(out))
        return self.head(F.avg_pool2d(out, 2).flatten(1))  # type: ignore[no-any-return]


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels, with pixels in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    split = train_test_split(
        images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    train_x, test_x, train_y, test_y = map(torch.from_numpy, split)
    return train_x, train_y, test_x, test_y


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 10) -> None:
    """Train with Adam on cross-entropy, in batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval()
