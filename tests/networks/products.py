"""Products and quotients of computed tensors, elementwise and contracted."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.mlp import Between
from tests.networks.network import Network

network = partial(Network, family="products")


def _gated_in_place(h: Tensor) -> Tensor:
    value, gate = h.tanh().split(6, dim=1)
    value = value.clone()
    value *= gate.sigmoid()
    return value


def _divided(h: Tensor) -> Tensor:
    numerator, denominator = h.chunk(2, dim=1)
    return numerator / (1.0 + denominator.exp())


def _swiglu(h: Tensor) -> Tensor:
    gate, value = h.chunk(2, dim=1)
    return F.silu(gate) * value


def _batched_matrices(h: Tensor) -> Tensor:
    left, right = h.reshape(-1, 2, 6).unbind(1)
    square = torch.bmm(left.reshape(-1, 2, 3), right.reshape(-1, 3, 2)).tanh()
    return torch.relu(torch.matmul(square, h.reshape(-1, 2, 6)))


class ComputedConvolution(nn.Module):
    """A convolution whose weights are computed from each sample.

    Parameters
    ----------
    grouped : bool
        Fold the batch into the groups of one `F.conv1d`; otherwise contract the windows with
        the weights by einsum.
    """

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.grouped = grouped
        self.weights = nn.Linear(10, 4 * 2 * 3)
        self.head = nn.Linear(4 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve every sample with its own weights."""
        batch = x.shape[0]
        weights = self.weights(x.flatten(1)).tanh().reshape(batch, 4, 2, 3)
        if self.grouped:
            folded = x.reshape(1, batch * 2, 5)
            y = F.conv1d(folded, weights.reshape(batch * 4, 2, 3), groups=batch)
            y = y.reshape(batch, 4, 3)
        else:
            y = torch.einsum("bctk,bock->bot", x.unfold(2, 3, 1), weights)
        return self.head(F.relu(y).flatten(1))


NETWORKS = [
    network("product_in_place", architecture=lambda: Between(_gated_in_place), gain=2.5),
    network("division", architecture=lambda: Between(_divided)),
    network("matmul_bmm", architecture=lambda: Between(_batched_matrices)),
    network("swiglu", architecture=lambda: Between(_swiglu)),
    network(
        "computed_convolution_grouped",
        architecture=lambda: ComputedConvolution(grouped=True),
        shapes=((2, 5),),
    ),
    network(
        "computed_convolution_einsum",
        architecture=lambda: ComputedConvolution(grouped=False),
        shapes=((2, 5),),
    ),
]
