"""Normalisations: the layers, the functions and by hand."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.mlp import MLP, Between
from tests.networks.network import Network

network = partial(Network, family="normalisation")


class Normalised(nn.Module):
    """A convolution of two channels, a normalisation, ReLU and a linear head.

    Parameters
    ----------
    norm : callable
        Applied to the (batch, 4, 5) tensor that the convolution gives.
    """

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 4, 3, padding=1)
        self.norm = norm
        self.relu = nn.ReLU()
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, rectify and read out."""
        return self.head(self.relu(self.norm(self.convolution(x))).flatten(1))


def _layer_norm_by_hand(h: Tensor) -> Tensor:
    mean = h.mean(dim=-1, keepdim=True)
    variance = (h - mean).pow(2).mean(dim=-1, keepdim=True)
    return (h - mean) / torch.sqrt(variance + 1e-5)


def _moments(h: Tensor) -> Tensor:
    rows = h.reshape(-1, 3, 4)
    return torch.cat([rows.std(dim=2), rows.var(dim=1, unbiased=False), rows.mean(2)], dim=1)


def _vector_norms(h: Tensor) -> Tensor:
    rows = h.reshape(-1, 3, 4)
    norms = [
        rows.norm(dim=2),
        torch.linalg.vector_norm(rows, ord=1, dim=1),
        torch.linalg.norm(rows, dim=(1, 2)).unsqueeze(1),
        rows.norm(p=3, dim=2),
    ]
    return torch.cat(norms, dim=1)


class CosineToPrototypes(nn.Module):
    """Cosine similarity of a hidden layer to learned vectors and between its own halves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 8)
        self.prototypes = nn.Parameter(torch.randn(5, 8))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Compare, then read out."""
        h = self.layer(x)
        to_prototypes = F.cosine_similarity(h.unsqueeze(1), self.prototypes, dim=-1)
        first, second = h.chunk(2, dim=1)
        between = F.cosine_similarity(first, second, dim=1)
        return self.head(torch.cat([to_prototypes, between.unsqueeze(1)], dim=1))


NETWORKS = [
    network(
        "batch_norm",
        architecture=lambda: Normalised(nn.BatchNorm1d(4)),
        shapes=((2, 5),),
        shap_exact=True,
    ),
    network("layer_norm", architecture=lambda: MLP(nn.LayerNorm(12), F.gelu)),
    network("layer_norm_by_hand", architecture=lambda: MLP(_layer_norm_by_hand, F.relu)),
    network("group_norm", architecture=lambda: Normalised(nn.GroupNorm(2, 4)), shapes=((2, 5),)),
    network(
        "instance_norm",
        architecture=lambda: Normalised(nn.InstanceNorm1d(4, affine=True)),
        shapes=((2, 5),),
    ),
    network("rms_norm", architecture=lambda: MLP(nn.RMSNorm(12), F.silu)),
    network("normalize", architecture=lambda: MLP(partial(F.normalize, dim=1), F.relu)),
    network("mean_std_var", architecture=lambda: Between(_moments)),
    network("vector_norms", architecture=lambda: Between(_vector_norms)),
    network("cosine_similarity", architecture=CosineToPrototypes),
]
