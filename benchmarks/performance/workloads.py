"""The networks whose explanation is timed, each as large as people use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tests.networks.network import Shape


@dataclass(frozen=True)
class Workload:
    """A network and the explanation to time.

    Parameters
    ----------
    build : callable
        Makes the network, under the current seed.
    shape : tuple of int
        The shape of one sample.
    references : int
        How many references.
    stock : bool
        Whether Captum and tangermeme can explain it, and in less than minutes.
    """

    build: Callable[[], nn.Module]
    shape: Shape
    references: int
    stock: bool = True


def mlp(depth: int = 3, outputs: int = 3) -> nn.Module:
    """Build a tabular network of 256 units a layer."""
    sizes = [30] + [256] * depth
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def cnn() -> nn.Module:
    """Build an image network, 3-32-64-64-128 channels on 32 x 32 pixels."""
    layers: list[nn.Module] = []
    channels = (3, 32, 64, 64, 128)
    for index, (before, after) in enumerate(zip(channels, channels[1:], strict=False)):
        stride = 1 if index == 0 else 2
        layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class DilatedConvolutions(nn.Module):
    """A genomics network in the manner of BPNet (Avsec et al. 2021): dilated residual layers.

    Parameters
    ----------
    kernel : int
        The odd size of the first kernel.
    depth : int
        How many dilated layers follow.
    outputs : int
    pool : callable
        ``pool(x, -1)`` reduces the positions.
    """

    def __init__(
        self,
        kernel: int = 21,
        depth: int = 8,
        outputs: int = 2,
        pool: Callable[[Tensor, int], Tensor] = torch.mean,
    ) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 64, kernel, padding=kernel // 2)
        self.first_activation = nn.ReLU()
        self.layers = nn.ModuleList(
            nn.Conv1d(64, 64, 3, padding=2**i, dilation=2**i) for i in range(1, depth + 1)
        )
        self.activations = nn.ModuleList(nn.ReLU() for _ in range(depth))
        self.head = nn.Linear(64, outputs)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Map one-hot sequences of shape (batch, 4, length)."""
        x = self.first_activation(self.first(x))
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = x + activation(layer(x))
        return self.head(self.pool(x, -1))


class Transformer(nn.Module):
    """Four encoder layers over 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map token embeddings of shape (batch, tokens, width)."""
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    """An LSTM over 50 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 64, batch_first=True)
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map series of shape (batch, steps, variables)."""
        return self.head(self.lstm(x)[0][:, -1])


class MiniLM(nn.Module):
    """MiniLM-L6 (a BERT of 6 layers, width 384) with random weights, from token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        import benchmarks.coverage.torchvision_import  # noqa: F401

        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
        from transformers import BertConfig, BertModel  # imports torchvision if it is there

        self.bert = BertModel(BertConfig(**sizes, vocab_size=100))
        self.head = nn.Linear(384, 2)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map token embeddings of shape (batch, tokens, 384)."""
        return self.head(self.bert(inputs_embeds=embeddings).last_hidden_state.mean(1))


class Bottleneck(nn.Module):
    """A residual block of ResNet-50 with a ReLU of its own for every use, none in place."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outside, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        self.short = nn.Identity()
        if stride > 1 or inside != outside:
            convolution = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.short = nn.Sequential(convolution, nn.BatchNorm2d(outside))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add the block to its input."""
        return self.activation(self.body(x) + self.short(x))


def resnet50() -> nn.Module:
    """Build ResNet-50 (He et al. 2016), with nothing reused or in place, and calibrate it."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    inside = 64
    for blocks, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inside, width, stride if block == 0 else 1))
            inside = 4 * width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, 64, 64))
    return network


WORKLOADS = {
    "tabular MLP": Workload(mlp, (30,), 100),
    "CNN": Workload(cnn, (3, 32, 32), 50),
    "dilated convolutions": Workload(DilatedConvolutions, (4, 2000), 20),
    "transformer": Workload(Transformer, (64, 64), 50),
    "MiniLM": Workload(MiniLM, (32, 384), 20),
    "ResNet-50": Workload(resnet50, (3, 64, 64), 10),
    "LSTM": Workload(Recurrent, (50, 8), 20, stock=False),
    "1,000 outputs": Workload(partial(mlp, outputs=1000), (30,), 20, stock=False),
}
