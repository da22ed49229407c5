"""Networks on one-hot DNA and on counts of cells, from reports to tangermeme and scvi."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.reports.report import Report

#: Bases of a sequence.
LENGTH = 8


def one_hot(count: int, seed: int) -> tuple[Tensor]:
    """Draw one-hot sequences of shape (count, 4, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    bases = torch.randint(0, 4, (count, LENGTH), generator=generator)
    return (F.one_hot(bases, 4).transpose(1, 2).float(),)


report = partial(
    Report,
    family="sequences",
    shapes=((4, LENGTH),),
    draw=one_hot,
    tools=("shap", "captum", "tangermeme"),
)


class OverlappingPools(nn.Module):
    """Convolutions with max pooling whose windows overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1, self.pool1 = nn.Conv1d(4, 6, 3), nn.ReLU(), nn.MaxPool1d(3, 1)
        self.conv2, self.relu2, self.pool2 = nn.Conv1d(6, 5, 2), nn.ReLU(), nn.MaxPool1d(2, 1)
        self.flat, self.dense, self.relu3 = nn.Flatten(), nn.Linear(10, 6), nn.ReLU()
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 4, length)."""
        h = self.pool1(self.relu1(self.conv1(x)))
        h = self.pool2(self.relu2(self.conv2(h)))
        return self.head(self.relu3(self.dense(self.flat(h))))


class OnlyPools(nn.Module):
    """Convolutions and max pooling without activations."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(4, 6, 3, padding=1, bias=False), nn.MaxPool1d(2),
            nn.Conv1d(6, 4, 3, padding=1), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 4, length)."""
        return self.net(x)


class Dilated(nn.Module):
    """Residual blocks with dilation, batch norms, and one activation for both convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 4, 3, padding=1)
        self.convs = nn.ModuleList(
            [nn.Conv1d(4, 4, 3, padding=2**i, dilation=2**i) for i in range(2)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm1d(4) for _ in range(2)])
        self.activation, self.head = nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 4, length)."""
        h = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = h + conv(self.activation(norm(h)))
        return torch.softmax(self.head(h.mean(-1)), -1)


class SumsAndDeviations(nn.Module):
    """The sum and the standard deviation over positions, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(4, 5, 3), nn.BatchNorm1d(10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 4, length)."""
        h = torch.relu(self.conv(x))
        pooled = torch.cat((h.sum(dim=2), h.std(dim=2)), dim=1)
        return self.head(self.norm(pooled))


class Profile(nn.Module):
    """A profile and a count, as ChromBPNet predicts them; the count is explained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dilated = nn.Conv1d(4, 5, 3), nn.Conv1d(5, 5, 3, dilation=2, padding=2)
        self.profile, self.count = nn.Conv1d(5, 1, 1), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take (batch, 4, length)."""
        h = F.relu(self.stem(x))
        h = h + F.relu(self.dilated(h))
        return self.profile(h).squeeze(1), self.count(h.mean(2)).squeeze()


class ReverseComplement(nn.Module):
    """A network that is run on both strands."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(4, 5, 3), nn.ELU(), nn.Flatten(), nn.Linear(30, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 4, length)."""
        return (self.net(x) + self.net(x.flip(1, 2))) / 2


class Twin(nn.Module):
    """One trunk for two sequences, and the difference of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Take two inputs of shape (batch, 4, length)."""
        return torch.subtract(self.trunk(x), self.trunk(y))


class CellTypes(nn.Module):
    """scANVI's classifier on the latent mean of log counts and a batch covariate."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(13, 6), nn.ReLU(), nn.Dropout(0.1))
        self.mean, self.scale = nn.Linear(6, 4), nn.Linear(6, 4)
        self.classify = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take a dict with counts ``X`` and the integers ``batch``."""
        x, one_hot_batch = torch.log1p(tensors["X"].abs()), F.one_hot(tensors["batch"], 3)
        h = self.encode(torch.cat([x, one_hot_batch.to(x.dtype)], -1))
        spread = torch.exp(self.scale(h)) + 1e-4
        return {"logits": self.classify(self.mean(h)), "scale": spread.sqrt()}


REPORTS = [
    report("overlapping_pools", architecture=OverlappingPools, source="tangermeme #49"),
    report("only_pools", architecture=OnlyPools, outputs=1, source="tangermeme #48"),
    report("dilated", architecture=Dilated, source="tangermeme #47"),
    report("sums_and_deviations", architecture=SumsAndDeviations, source="tangermeme #13"),
    report("profile", architecture=Profile, outputs=1, options={"output": 1}, source="ChromBPNet"),
    report("reverse_complement", architecture=ReverseComplement, source="both strands"),
    report(
        "twin",
        architecture=Twin,
        shapes=((4, LENGTH), (4, LENGTH)),
        draw=lambda count, seed: one_hot(count, seed) + one_hot(count, seed + 9),
        tools=("shap", "captum"),
        source="tangermeme #43",
    ),
    Report(
        "cell_types",
        "sequences",
        CellTypes,
        options={"input_names": "X", "output": "logits"},
        bound={"batch": torch.tensor([1])},
        source="scvi-tools #3383",
    ),
]
