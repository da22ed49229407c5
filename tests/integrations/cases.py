"""The models and the data on which the libraries are tried."""

import torch
import torch.nn.functional as F
from tangermeme.utils import random_one_hot
from torch import Tensor, nn

EXACT = 1e-13  # absolute, of outputs near 1 in float64


class Model(nn.Module):
    """In-place and reused activations, a gate that takes integers, and outputs of 3 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.Linear(20, 6)
        self.gates = nn.Embedding(3, 6)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor, gate: Tensor | None = None, scale: float = 1.0) -> Tensor:
        h = self.act(self.conv(x)).flatten(1)
        h = F.gelu(self.mix(h)) * scale
        if gate is not None:
            h = h * self.gates(gate).sigmoid()
        return torch.softmax(self.head(h), 1).unflatten(1, (2, 3))


def data(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, 5, generator=generator, dtype=torch.float64)


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


SAMPLES, REFERENCES, BACKGROUND = data(3, 1), data(3, 2), data(4, 3)
GATE = torch.tensor([0, 2, 1])


class Sequences(nn.Module):
    """One-hot sequences to two numbers, through operations that tangermeme has no rules for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 6, 5, padding=2), nn.Conv1d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = F.gelu(self.first(x))
        h = (h + self.second(h).sigmoid() * h).amax(2)
        return self.head(h if scale is None else h * scale)


ONE_HOT = random_one_hot((3, 4, 20), random_state=0).double()
OPTIONS = {"n_shuffles": 3, "random_state": 0, "device": "cpu", "warning_threshold": EXACT}
