"""How tensors are laid out and passed on: residuals, views, folding, several inputs."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.network import Network

network = partial(Network, family="layouts")


class Residual(nn.Module):
    """Two residual blocks with batch norm and reused in-place ReLU, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(10, 10) for _ in range(2))
        self.second = nn.ModuleList(nn.Linear(10, 10) for _ in range(2))
        self.norm = nn.ModuleList(nn.BatchNorm1d(10) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Add each block to its input in place."""
        for first, second, norm in zip(self.first, self.second, self.norm, strict=True):
            identity = x
            out = self.relu(norm(first(x)))
            out = second(out)
            out += identity
            x = self.relu(out)
        return self.head(x)


class TimeFolded(nn.Module):
    """Time folded into the batch dimension: (T, B, C) reshaped to (T * B, C) and back."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.head = nn.Linear(5 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Encode every step by itself, then join the steps of each sample."""
        steps = x.transpose(0, 1)
        time, batch, channels = steps.shape
        encoded = self.encode(steps.reshape(time * batch, channels))
        encoded = F.gelu(encoded.view(time, batch, -1).permute(1, 0, 2))
        return self.head(encoded.reshape(batch, -1))


class Siamese(nn.Module):
    """One encoder applied to both halves of the input, and their difference compared."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.GELU())
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Compare the encodings of the two rows."""
        first, second = self.encode(x[:, 0]), self.encode(x[:, 1])
        return self.head(torch.cat([(first - second).abs(), first * second], dim=1))


class TwoInputs(nn.Module):
    """Two input tensors of unlike shapes that meet in a product."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Linear(4, 8)
        self.matrix = nn.Linear(2, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, vector: Tensor, matrix: Tensor) -> Tensor:
        """Gate the pooled rows of the matrix by the vector."""
        return self.head(self.vector(vector).sigmoid() * F.relu(self.matrix(matrix)).sum(dim=1))


class WrittenInPlace(nn.Module):
    """A result tensor filled slice by slice, and the input's copy changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Write the two halves into one tensor."""
        x = x.clone()
        x[:, 1] -= 0.5 * x[:, 0]
        h = x.new_empty(x.shape[0], 8)
        h[:, :4] = self.left(x[:, 0])
        h[:, 4:] = self.right(x[:, 1])
        h[:, 2:6].mul_(2.0)
        h.add_(h.flip(1)).tanh_()
        return self.head(h)


NETWORKS = [
    network("residual_in_place", architecture=Residual),
    network("time_folded", architecture=TimeFolded, shapes=((5, 2),)),
    network("siamese", architecture=Siamese, shapes=((2, 5),)),
    network("two_inputs", architecture=TwoInputs, shapes=((4,), (3, 2))),
    network("written_in_place", architecture=WrittenInPlace, shapes=((2, 5),)),
]
