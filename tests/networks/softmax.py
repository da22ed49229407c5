"""Softmax, log-softmax and logsumexp, inside and at the output."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.mlp import MLP, Between
from tests.networks.network import Network

network = partial(Network, family="softmax")


def _by_hand(h: Tensor) -> Tensor:
    weights = torch.exp(h - h.max(dim=-1, keepdim=True).values)
    return weights / weights.sum(dim=-1, keepdim=True)


def _smooth_maxima(h: Tensor) -> Tensor:
    rows = h.reshape(-1, 3, 4)
    return torch.cat([rows.logsumexp(dim=2), torch.logsumexp(rows, dim=1)], dim=1)


class SoftmaxOutput(nn.Module):
    """A ReLU network that returns the softmax or the log-softmax of its logits.

    Parameters
    ----------
    output : nn.Module
        The last layer.
    """

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.logits = MLP(nn.ReLU(), nn.ReLU())
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """Return the (log-)probabilities."""
        return self.output(self.logits(x))


NETWORKS = [
    network(
        "softmax_inside",
        architecture=lambda: MLP(nn.Softmax(dim=-1), partial(F.softmax, dim=1)),
        gain=4.0,
    ),
    network("softmax_by_hand", architecture=lambda: MLP(_by_hand), gain=3.0),
    network("softmax_output", architecture=lambda: SoftmaxOutput(nn.Softmax(dim=1)), gain=2.0),
    network("log_softmax_output", architecture=lambda: SoftmaxOutput(nn.LogSoftmax(dim=1))),
    network("logsumexp", architecture=lambda: Between(_smooth_maxima), gain=3.0),
]
