"""Networks from public reports to SHAP, Captum and tangermeme, rebuilt small."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.reports.report import Report

report = partial(Report, family="published")


class ReusedActivation(nn.Module):
    """One ReLU in place for every layer of a residual block, as torchvision's ResNet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.shortcut, self.relu = nn.Conv2d(1, 3, 1), nn.ReLU(inplace=True)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 1, 3, 3)."""
        h = self.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        h += self.shortcut(x)
        return self.head(torch.flatten(self.pool(self.relu(h)), 1))


class ActivationTwice(nn.Module):
    """One activation that is stored as an attribute and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(10, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.activation = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 10)."""
        h = self.activation(self.first(x))
        return self.head(self.activation(self.second(h)))


class NewActivations(nn.Module):
    """Activations that are made in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv1d(2, 4, 2),
            nn.Conv1d(4, 4, 2),
            nn.Linear(12, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 2, 5)."""
        h = nn.ReLU()(self.first(x))
        return self.head(nn.Flatten()(nn.ReLU()(self.second(h))))


class Voxels(nn.Module):
    """A convolutional network on voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv3d(1, 3, 2, padding=1), nn.MaxPool3d(3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 1, 2, 2, 2) voxels."""
        return self.head(self.pool(F.relu(self.conv(x))).view(x.size(0), -1))


class ConvRecurrent(nn.Module):
    """A convolution, an LSTM and a dense network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.recurrent = nn.Conv1d(2, 4, 2), nn.LSTM(4, 4, batch_first=True)
        self.dense = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 5, 2)."""
        h = torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.dense(self.recurrent(h)[0][:, -1])


class InvertedResidual(nn.Module):
    """MobileNet's block: expand, depthwise convolution, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU6(True),
            nn.Conv2d(4, 1, 1, bias=False), nn.BatchNorm2d(1),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 1, 3, 3)."""
        return self.head((x + self.block(x)).flatten(1))


class Probabilities(nn.Module):
    """Functional activations, and a softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 10)."""
        return F.softmax(self.head(F.relu(self.first(x))), dim=1)


class Normalized(nn.Module):
    """A layer norm between dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(10, 6),
            nn.LayerNorm(6),
            nn.ReLU(),
            nn.Linear(6, 5),
            nn.GELU(),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 10)."""
        return self.net(x)


class SeriesAndStatics(nn.Module):
    """A series through an LSTM, and static features that are joined to its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.static = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, series: Tensor, static: Tensor) -> Tensor:
        """Take (batch, 3, 2) and (batch, 4)."""
        steps, _ = self.recurrent(series)
        return self.head(torch.cat([steps[:, -1, :], torch.relu(self.static(static))], dim=-1))


class Categories(nn.Module):
    """Embedded categories and continuous columns, as fastai's tabular models."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(4, 3), nn.Embedding(3, 2)])
        self.net = nn.Sequential(nn.Linear(15, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))

    def forward(self, categories: Tensor, continuous: Tensor) -> Tensor:
        """Take (batch, 2) integers and (batch, 10)."""
        e = [embed(categories[:, i]) for i, embed in enumerate(self.embeddings)]
        return self.net(torch.cat([*e, (continuous - 0.1) / 0.9], 1))


class Encoder(nn.Module):
    """The encoder of a variational autoencoder, which returns a mean and a log variance."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(10, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take counts of shape (batch, 10)."""
        h = self.hidden(torch.log1p(F.softplus(x)))
        return self.mean(h), self.log_variance(h).clamp(-10, 10)


class Forecast(nn.Module):
    """An LSTM whose head gives the mean and the scale of a distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.mean, self.scale = nn.LSTM(2, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 5, 2)."""
        size = x[:, :, :1].abs().mean(1, keepdim=True) + 1
        h, _ = self.recurrent((x / size).transpose(0, 1))
        mean, scale = self.mean(h[-1]), F.softplus(self.scale(h[-1]))
        return torch.cat([mean * size[:, 0], scale * size[:, 0]], 1)


class Shuffled(nn.Module):
    """ShuffleNet's block: split channels, one branch, concatenate, shuffle channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 4, 1)
        self.act = nn.LeakyReLU(negative_slope=0.1, inplace=True)
        self.branch, self.head = nn.Conv1d(2, 2, 3, padding=1), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 2, 5)."""
        for _ in range(2):
            x = self.stem(x) if x.shape[1] == 2 else x
            left, right = x.chunk(2, dim=1)
            x = torch.cat((left, self.act(self.branch(right))), dim=1)
            rows, channels, steps = x.size()
            x = x.view(rows, 2, channels // 2, steps).transpose(1, 2).contiguous()
            x = x.view(rows, -1, steps)
        return self.head(x.flatten(1))


class ExplicitAttention(nn.Module):
    """BERT's attention with a softmax module, a residual and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(2, 4)
        self.softmax, self.output, self.norm = nn.Softmax(dim=-1), nn.Linear(4, 2), nn.LayerNorm(2)
        self.pooler, self.classifier = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 5, 2)."""
        q, k, v = (f(x).view(*x.shape[:2], 2, 2).permute(0, 2, 1, 3) for f in self.projections())
        weights = self.softmax(q @ k.transpose(-1, -2) / math.sqrt(2))
        h = (weights @ v).permute(0, 2, 1, 3).contiguous().view(*x.shape[:2], 4)
        h = self.norm(self.output(h) + x)
        return self.classifier(torch.tanh(self.pooler(h[:, 0])))

    def projections(self) -> tuple[nn.Module, ...]:
        """Return the three linear layers."""
        return self.query, self.key, self.value


class GatedTabular(nn.Module):
    """TabNet's step: a sparse mask of the features, shared layers with gated linear units."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(10)
        self.attention, self.shared, self.own = nn.Linear(4, 10), nn.Linear(10, 8), nn.Linear(4, 8)
        self.head = nn.Linear(4, 3)

    def transform(self, x: Tensor) -> Tensor:
        """Return two gated layers with a scaled residual."""
        h = F.glu(self.shared(x))
        return (h + F.glu(self.own(h))) * math.sqrt(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 10)."""
        x = self.norm(x)
        prior, total, state = torch.ones_like(x), 0, self.transform(x)
        for _ in range(2):
            mask = sparsemax(self.attention(state) * prior)
            prior = prior * (1.3 - mask)
            state = self.transform(mask * x)
            total = total + F.relu(state)
        return self.head(total)


def sparsemax(z: Tensor) -> Tensor:
    """Project scores onto the probability simplex (Martins and Astudillo 2016)."""
    ordered, _ = z.sort(dim=-1, descending=True)
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    sums = ordered.cumsum(-1)
    support = (1 + count * ordered > sums).sum(-1, keepdim=True)
    threshold = (sums.gather(-1, support - 1) - 1) / support
    return (z - threshold).clamp(min=0)


class Inception(nn.Module):
    """InceptionTime's module: a bottleneck, three convolutions and a pooled branch."""

    def __init__(self) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(2, 3, 1, bias=False)
        self.convs = nn.ModuleList([nn.Conv1d(3, 2, k, padding="same") for k in (1, 3, 5)])
        self.pooled = nn.Sequential(nn.MaxPool1d(3, 1, padding=1), nn.Conv1d(2, 2, 1))
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 2, 5)."""
        h = self.bottleneck(x)
        h = torch.cat([conv(h) for conv in self.convs] + [self.pooled(x)], dim=1)
        return self.head(F.relu(self.norm(h)).mean(-1))


class Backcast(nn.Module):
    """N-BEATS: every block explains what the blocks before it left."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(10, 6), nn.ReLU()) for _ in range(2)])
        self.backcasts = nn.ModuleList([nn.Linear(6, 10, bias=False) for _ in range(2)])
        self.forecasts = nn.ModuleList([nn.Linear(6, 3, bias=False) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 10)."""
        residual, forecast = x, torch.zeros(x.shape[0], 3, dtype=x.dtype)
        for block, back, fore in zip(self.blocks, self.backcasts, self.forecasts, strict=True):
            h = block(residual)
            residual = residual - back(h)
            forecast = forecast + fore(h)
        return forecast


REPORTS = [
    report(
        "reused_activation",
        architecture=ReusedActivation,
        shapes=((1, 3, 3),),
        source="SHAP #1479, Captum #480",
    ),
    report("activation_twice", architecture=ActivationTwice, source="SHAP #3725"),
    report("new_activations", architecture=NewActivations, shapes=((2, 5),), source="Captum #1082"),
    report("voxels", architecture=Voxels, shapes=((1, 2, 2, 2),), source="SHAP #2419"),
    report("conv_recurrent", architecture=ConvRecurrent, shapes=((5, 2),), source="SHAP #2765"),
    report("mobile_block", architecture=InvertedResidual, shapes=((1, 3, 3),), source="SHAP #1140"),
    report("probabilities", architecture=Probabilities, source="SHAP #2204"),
    report("normalized", architecture=Normalized, source="SHAP #3438"),
    report(
        "series_and_statics",
        architecture=SeriesAndStatics,
        shapes=((3, 2), (4,)),
        source="SHAP #739, SHAP #2526",
    ),
    report(
        "categories",
        architecture=Categories,
        options={"input_names": "continuous"},
        bound={"categories": torch.tensor([[3, 1]])},
        source="SHAP #329",
    ),
    report("encoder", architecture=Encoder, options={"output": 0}, source="SHAP #3071"),
    report("forecast", architecture=Forecast, shapes=((5, 2),), outputs=2, source="SHAP #1547"),
    report("shuffled", architecture=Shuffled, shapes=((2, 5),), source="Captum #934"),
    report(
        "explicit_attention", architecture=ExplicitAttention, shapes=((5, 2),), source="Captum #519"
    ),
    report("gated_tabular", architecture=GatedTabular, source="TabNet #102"),
    report("inception", architecture=Inception, shapes=((2, 5),), source="tsai #750, tsai #771"),
    report("backcast", architecture=Backcast, source="Darts #624"),
]
