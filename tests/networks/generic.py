"""Operations on whole rows: sorting, products and maxima so far, spectra, distances, indices."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.networks.mlp import MLP, Between
from tests.networks.network import Network

network = partial(Network, family="generic")


def _sorted(h: Tensor) -> Tensor:
    return torch.cat([h.sort(dim=1).values, 2 * torch.topk(h, 4, dim=1).values], dim=1)


def _gathered(h: Tensor) -> Tensor:
    scores, values = h.reshape(-1, 2, 6).unbind(1)
    return values.gather(1, scores.argsort(dim=1)[:, :4]).tanh()


def _products(h: Tensor) -> Tensor:
    factors = 1.0 + 0.5 * h.reshape(-1, 4, 3)
    return torch.cat([factors.prod(dim=2), torch.cumprod(factors, dim=1).flatten(1)], dim=1)


def _cumulative_extremes(h: Tensor) -> Tensor:
    return torch.cat([h.cummax(dim=1).values, h.cummin(dim=1).values], dim=1)


def _long_product(h: Tensor) -> Tensor:
    return (1.0 + 0.3 * h).cumprod(dim=1)


def _product_of_three(h: Tensor) -> Tensor:
    a, b, c = h.reshape(-1, 3, 2, 2).unbind(1)
    return torch.einsum("bij,bjk,bkl->bil", a, b, c)


def _cumulative_smooth_maximum(h: Tensor) -> Tensor:
    return torch.logcumsumexp(2 * h, dim=1)


def _singular_values(h: Tensor) -> Tensor:
    return torch.linalg.svdvals(h.reshape(-1, 4, 3))


def _spectrum(h: Tensor) -> Tensor:
    return torch.fft.rfft(h, dim=1).abs()


def _ranked_by_counting(h: Tensor) -> Tensor:
    scores, values = h.reshape(-1, 2, 6).unbind(1)
    winner = (scores.unsqueeze(-1) < scores.unsqueeze(-2)).sum(-1)  # how many are above each
    return values.gather(1, winner)


def _sampled(h: Tensor) -> Tensor:
    picture, grid = h[:, :9].reshape(-1, 1, 3, 3), h[:, 3:].reshape(-1, 3, 3, 2)
    return functional.grid_sample(picture, torch.tanh(grid), align_corners=False)


def _patches(h: Tensor) -> Tensor:
    patches = torch.tanh(functional.unfold(h.reshape(-1, 1, 4, 4), 2, stride=1))
    return functional.fold(patches, (4, 4), 2, stride=1).sigmoid()


def _weighted_bag(h: Tensor) -> Tensor:
    table = torch.linspace(-1, 1, 24).reshape(12, 2).sin()
    ids = torch.arange(12, device=h.device).repeat(len(h), 1)
    bag = functional.embedding_bag(
        ids, table.to(h), per_sample_weights=torch.tanh(2 * h), mode="sum"
    )
    return torch.exp(bag)


def _matrix_norms(h: Tensor) -> Tensor:
    matrices = h.reshape(-1, 3, 2, 2)
    norms = [torch.linalg.matrix_norm(matrices), torch.linalg.vector_norm(h, 3, dim=1)[:, None]]
    return torch.cat([*norms, torch.linalg.vector_norm(matrices, torch.inf, dim=2).flatten(1)], 1)


def _scattered(h: Tensor) -> Tensor:
    index = torch.tensor([0, 2, 2, 5, 1, 0], device=h.device)
    added = torch.zeros_like(h[:, :6]).index_add(1, index, h[:, :6])
    rows = torch.arange(len(h), device=h.device)[:, None]
    put = added.index_put((rows, index[None, :3]), h[:, 6:9], accumulate=True)
    return torch.tanh(put.scatter_add(1, index.expand(len(h), 6), h[:, 6:] ** 2))


def _assigned(h: Tensor) -> Tensor:
    index = torch.tensor([0, 2, 2, 5, 1, 0], device=h.device)
    whole = torch.zeros_like(h[:, :6])
    whole[:, index] = h[:, :6] ** 2  # of two values for one position the last one stays
    copied = h[:, :6].index_copy(1, index[:3], h[:, 6:9].sin())
    return torch.tanh(whole.scatter(1, index[2:4].expand(len(h), 2), h[:, 9:11]) * copied)


def _looked_up(h: Tensor) -> Tensor:
    levels = torch.linspace(-2, 2, 7).to(h)
    return torch.searchsorted(levels, h, side="right") * torch.sigmoid(h)


def _reduced(h: Tensor) -> Tensor:
    index = torch.tensor([0, 3, 3, 1, 0, 3, 1, 2], device=h.device).expand(len(h), 8)
    base = h[:, :4]
    reduced = [base.scatter_reduce(1, index, h[:, 4:], how) for how in ("amax", "mean", "prod")]
    return torch.cat(reduced, 1)


def _angles(h: Tensor) -> Tensor:
    phases = torch.fft.rfft(h[:, :6], dim=1)[:, 1:3].angle()
    return torch.cat([torch.atan2(h[:, 6:9], h[:, 9:]), phases], 1).sin()


def _quantiles(h: Tensor) -> Tensor:
    levels = torch.tensor([0.15, 0.5, 0.8]).to(h)
    return h.reshape(-1, 2, 6).quantile(levels, dim=2).movedim(0, 1).flatten(1)


def _inverted(h: Tensor) -> Tensor:
    matrices = torch.eye(3).to(h) + 0.5 * h[:, :9].reshape(-1, 3, 3).tanh()
    solved = torch.linalg.solve(matrices, h[:, 9:])
    return torch.cat(
        [matrices.inverse().flatten(1), solved, torch.linalg.det(matrices)[:, None]], 1
    )


class Buckets(nn.Module):
    """Every feature in one of five buckets, each with an embedding (Gorishniy et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("boundaries", torch.tensor([-1.0, -0.3, 0.3, 1.0]))
        self.table = nn.Embedding(5, 3)
        self.head = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Look up and join."""
        return self.head(self.table(torch.bucketize(x, self.boundaries)).flatten(1))


class BagOfCodes(nn.Module):
    """The mean embedding of features that are rounded to codes; code 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 6, mode="mean", padding_idx=0)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Round and embed."""
        codes = (2 * x).round().clamp(-4, 4).long() + 4
        return self.head(self.bag(codes))


class RadialBasis(nn.Module):
    """Gaussian radial basis functions of the distances to learned centres."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(6, 2))
        self.head = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Measure the distances of the points to the centres."""
        distances = torch.cdist(x, self.centres.expand(x.shape[0], -1, -1))
        return self.head(torch.exp(-0.3 * distances).flatten(1))


NETWORKS = [
    network("gather_counted", architecture=lambda: Between(_ranked_by_counting)),
    network("bucketize_embedding", architecture=Buckets),
    network("sort_topk", architecture=lambda: Between(_sorted)),
    network("gather_argsort", architecture=lambda: Between(_gathered)),
    network("prod_cumprod", architecture=lambda: Between(_products)),
    network("cumprod_of_twelve", architecture=lambda: Between(_long_product)),
    network("einsum_of_three", architecture=lambda: Between(_product_of_three)),
    network("cummax_cummin", architecture=lambda: Between(_cumulative_extremes)),
    network("logcumsumexp", architecture=lambda: MLP(_cumulative_smooth_maximum, torch.tanh)),
    network("singular_values", architecture=lambda: Between(_singular_values)),
    network("fourier_magnitude", architecture=lambda: Between(_spectrum)),
    network("grid_sample", architecture=lambda: Between(_sampled, width=21)),
    network("unfold_fold", architecture=lambda: Between(_patches, width=16)),
    network("embedding_bag_weighted", architecture=lambda: Between(_weighted_bag)),
    network("embedding_bag_of_codes", architecture=BagOfCodes),
    network("matrix_norms", architecture=lambda: Between(_matrix_norms)),
    network("index_add_put_scatter", architecture=lambda: Between(_scattered)),
    network("assigned_twice", architecture=lambda: Between(_assigned)),
    network("scatter_reduce", architecture=lambda: Between(_reduced)),
    network("angles", architecture=lambda: Between(_angles)),
    # Before, torch asks for the number of elements of a tensor with a symbolic size.
    network("quantiles", architecture=lambda: Between(_quantiles), oldest_torch=(2, 13)),
    network("inverse_determinant", architecture=lambda: Between(_inverted)),
    network("searchsorted", architecture=lambda: Between(_looked_up)),
    network("cdist_radial_basis", architecture=RadialBasis, shapes=((5, 2),)),
]
