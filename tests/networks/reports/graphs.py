"""Graph networks and bags of instances: the structure is bound, and all samples share it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tests.networks.reports.report import Report

report = partial(Report, family="graphs", shapes=((5, 2),))

#: A ring of five nodes, in both directions.
RING = torch.tensor([[0, 1, 2, 3, 4, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 0, 1, 2, 3, 4]])

#: The edges of a chain of five nodes, as a dense matrix.
CHAIN = torch.eye(5) + torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1)


class RowsOfGraphs(nn.Module):
    """Graph convolutions over the second dimension of a batch of graphs with the same edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Take (batch, nodes, 2) and (2, edges)."""
        source, target = edge_index
        for layer in (self.first, self.second):
            h = layer(x)
            x = torch.relu(torch.zeros_like(h).index_add(1, target, h[:, source]))
        return self.head(x.amax(1))


class OneGraph(nn.Module):
    """Graph convolutions, and a mean over the nodes of each graph, as in PyTorch Geometric."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def convolve(self, layer: nn.Module, x: Tensor, edge_index: Tensor) -> Tensor:
        """Return the normalised sum over the neighbours."""
        source, target = edge_index
        degree = x.new_zeros(len(x)).index_add(0, target, x.new_ones(target.numel()))
        norm = (degree[source] * degree[target]).rsqrt()
        h = layer(x)
        return torch.zeros_like(h).index_add(0, target, h[source] * norm[:, None])

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        """Take (nodes, 2), (2, edges) and (nodes,)."""
        h = torch.relu(self.convolve(self.first, x, edge_index))
        h = torch.relu(self.convolve(self.second, h, edge_index))
        index = batch[:, None].expand_as(h)
        total = h.new_zeros(1, h.shape[1]).scatter_add(0, index, h)
        return torch.log_softmax(self.head(total / len(x)), -1)


class DenseAdjacency(nn.Module):
    """Convolutions with an adjacency matrix, of one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Take (nodes, 2) and (nodes, nodes)."""
        weights = adjacency / adjacency.sum(1, keepdim=True)
        return self.head(weights @ torch.tanh(self.first(weights @ x))).mean(0)


class GraphAttention(nn.Module):
    """Attention over the neighbours: a softmax in groups of edges."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.score, self.head = nn.Linear(2, 4), nn.Linear(8, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Take (nodes, 2) and (2, edges)."""
        source, target = edge_index
        h = self.project(x)
        scores = nn.functional.leaky_relu(self.score(torch.cat([h[source], h[target]], 1)), 0.2)
        weights = scores.exp()
        total = x.new_zeros(len(x), 1).index_add(0, target, weights)
        messages = h[source] * weights / total[target]
        received = torch.zeros_like(h).index_add(0, target, messages)
        return self.head(nn.functional.elu(received)).sum(0)


class BagOfInstances(nn.Module):
    """Gated attention over the instances of one bag."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.value, self.gate = nn.Linear(2, 5), nn.Linear(5, 4), nn.Linear(5, 4)
        self.score, self.head = nn.Linear(4, 1), nn.Linear(5, 2)

    def forward(self, bag: Tensor) -> Tensor:
        """Take (instances, 2)."""
        h = torch.relu(self.encode(bag))
        a = torch.softmax(self.score(torch.tanh(self.value(h)) * torch.sigmoid(self.gate(h))), 0)
        return self.head((a * h).sum(0, keepdim=True))


class OneSeries(nn.Module):
    """A recurrent layer on one series without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take (steps, 2)."""
        return self.head(self.recurrent(x)[1].squeeze())


UNBATCHED = {"unbatched": True}

REPORTS = [
    report(
        "rows_of_graphs",
        architecture=RowsOfGraphs,
        bound={"edge_index": RING},
        source="temporal graph networks",
    ),
    report(
        "one_graph",
        architecture=OneGraph,
        options=UNBATCHED,
        bound={"edge_index": RING, "batch": torch.zeros(5, dtype=torch.long)},
        source="PyTorch Geometric #6389",
    ),
    report(
        "dense_adjacency",
        architecture=DenseAdjacency,
        options=UNBATCHED,
        bound={"adjacency": CHAIN},
        source="Captum #375",
    ),
    report(
        "graph_attention",
        architecture=GraphAttention,
        options=UNBATCHED,
        bound={"edge_index": RING},
        source="PyTorch Geometric #6956",
    ),
    report(
        "bag_of_instances",
        architecture=BagOfInstances,
        options=UNBATCHED,
        outputs=2,
        source="multiple-instance learning",
    ),
    report(
        "one_series", architecture=OneSeries, options=UNBATCHED, source="models without batches"
    ),
]
