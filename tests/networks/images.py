"""Convolutional networks and the blocks of image models."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.network import Network

network = partial(Network, family="images", shapes=((1, 2, 5),))


def _convolution_modules() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, (1, 3), stride=(1, 2)),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class SqueezeExcite(nn.Module):
    """A convolution whose channels are gated by their own pooled values."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 6, 3, padding=1)
        self.squeeze = nn.Conv2d(6, 3, 1)
        self.excite = nn.Conv2d(3, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, gate and pool."""
        h = F.silu(self.convolution(x), inplace=True)
        scale = h.mean((2, 3), keepdim=True)
        scale = self.excite(F.relu(self.squeeze(scale), inplace=True))
        return self.head(F.adaptive_avg_pool2d(h * torch.sigmoid(scale), 1).flatten(1))


class InvertedResidual(nn.Module):
    """MobileNet's block: expand, depthwise convolution, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.block = nn.Sequential(
            nn.Conv2d(4, 8, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.Hardswish(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.Hardswish(inplace=True),
            nn.Conv2d(8, 4, 1, bias=False),
            nn.BatchNorm2d(4),
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Add the block to its input and take the largest value of each channel."""
        h = self.stem(x)
        return self.head((h + self.block(h)).amax(dim=(2, 3)))


class Upsampling(nn.Module):
    """Pool, interpolate back and join with the features before pooling, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, (2, 3), stride=2, padding=(0, 1))
        self.up = nn.Conv2d(9, 4, 3, padding=1)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run down and up again."""
        small = F.silu(self.down(x))
        smooth = F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
        blocks = F.interpolate(small.relu(), size=x.shape[2:], mode="nearest")
        joined = torch.cat([x, smooth, blocks], dim=1)
        return self.head(F.relu(self.up(joined)).flatten(1))


NETWORKS = [
    network("convolution_modules", architecture=_convolution_modules, shap_exact=True),
    network("squeeze_excite", architecture=SqueezeExcite, gain=2.5),
    network("upsampling", architecture=Upsampling, gain=2.5),
    network("inverted_residual", architecture=InvertedResidual),
]
