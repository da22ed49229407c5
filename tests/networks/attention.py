"""Attention: by hand, by PyTorch's functions and by its layers."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.network import Network

network = partial(Network, family="attention", shapes=((5, 2),))

WIDTH = 8
HEADS = 2
TOKENS = 5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SelfAttention(nn.Module):
    """Tokens attend to each other; their mean is read out.

    Parameters
    ----------
    attend : callable
        A function of queries, keys and values, each (batch, heads, tokens, channels).
    """

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.projections = nn.Linear(WIDTH, 3 * WIDTH)
        self.attend = attend
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Project, attend, average and read out."""
        projected = self.projections(self.embed(x))
        q, k, v = projected.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return self.head(y.mean(dim=1))


def attend_by_hand_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal softmax attention written with einsum and `masked_fill`."""
    scores = torch.einsum("bhqc,bhkc->bhqk", q, k) * q.shape[-1] ** -0.5
    future = q.new_ones(q.shape[-2], q.shape[-2]).triu(1).bool()
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqk,bhkc->bhqc", weights, v)


def attend_with_boolean_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention in which every token sees itself and its neighbours."""
    position = torch.arange(TOKENS, device=q.device)
    near = (position[:, None] - position).abs() <= 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near)


def attend_with_float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention with scores that fall with the distance, as in ALiBi."""
    position = torch.arange(TOKENS, dtype=q.dtype, device=q.device)
    bias = -0.5 * (position[:, None] - position).abs()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class AttentionPooling(nn.Module):
    """A learned query attends to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(2, WIDTH)
        self.values = nn.Linear(2, WIDTH)
        self.query = nn.Parameter(torch.randn(WIDTH, 1))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the values of the tokens by the scores of their keys."""
        weights = F.softmax(self.keys(x) @ self.query, dim=1)
        return self.head((weights * F.gelu(self.values(x))).sum(dim=1))


class MultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` in both layouts, with and without the weights it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.first = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.second = nn.MultiheadAttention(WIDTH, HEADS)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Attend twice, average and read out; add the largest weights."""
        h = self.embed(x)
        h = h + self.first(h, h, h, need_weights=False)[0]
        h = h.transpose(0, 1)
        y, weights = self.second(h, h, h)
        return self.head(y.mean(dim=0)) + weights.amax(dim=(1, 2)).unsqueeze(1)


class Encoder(nn.Module):
    """Transformer encoder layers over the tokens.

    Parameters
    ----------
    layers : int
        The number of layers.
    **options
        Arguments of `nn.TransformerEncoderLayer`.
    """

    def __init__(self, layers: int = 1, **options: object) -> None:
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.position = nn.Parameter(0.3 * torch.randn(TOKENS, WIDTH))
        self.batch_first = bool(options.get("batch_first", False))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=16, **options)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Encode the tokens and read out the first."""
        h = self.embed(x) + self.position
        if self.batch_first:
            return self.head(self.encoder(h)[:, 0])
        return self.head(self.encoder(h.transpose(0, 1))[0])


class CrossAttention(nn.Module):
    """A transformer decoder layer whose two learned queries look at the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.queries = nn.Parameter(torch.randn(2, WIDTH))
        self.decoder = nn.TransformerDecoderLayer(
            WIDTH, HEADS, dim_feedforward=16, batch_first=True
        )
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Decode from the tokens and read out both queries."""
        queries = self.queries.expand(x.shape[0], -1, -1)
        return self.head(self.decoder(queries, self.embed(x)).flatten(1))


class Performer(nn.Module):
    """Attention by positive random features (Choromanski et al. 2021, eq. 5 and lemma 1).

    exp(q k) is the mean of exp(w q - |q|^2 / 2) exp(w k - |k|^2 / 2) over random w, so that keys
    and values are summed once for all queries. The largest exponents are taken out, as the
    authors' code does: of every query, and of all keys.
    """

    def __init__(self, features: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        size = WIDTH // HEADS
        blocks = [torch.linalg.qr(torch.randn(size, size))[0] for _ in range(-(-features // size))]
        directions = torch.cat(blocks)[:features]  # orthogonal, which lowers the variance
        lengths = torch.randn(features, size).norm(dim=1, keepdim=True)
        self.register_buffer("directions", lengths * directions)
        self.head = nn.Linear(TOKENS * WIDTH, 3)

    def features(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Positive random features of queries or keys, but for a common factor over `dims`."""
        x = x * x.shape[-1] ** -0.25
        exponents = x @ self.directions.T - x.square().sum(-1, keepdim=True) / 2
        largest = exponents.amax(dims, keepdim=True).detach()
        return torch.exp(exponents - largest) + 1e-4

    def forward(self, x: Tensor) -> Tensor:
        """Attend without a matrix of all pairs."""
        parts = self.qkv(torch.tanh(self.embed(x))).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        q, k = self.features(q, (-1,)), self.features(k, (-2, -1))
        total = torch.einsum("bhim,bhm->bhi", q, k.sum(2))
        y = (q @ (k.mT @ v)) / total.unsqueeze(-1)
        return self.head(y.transpose(1, 2).flatten(1))


NETWORKS = [
    network(
        "attention_by_hand_causal", architecture=lambda: SelfAttention(attend_by_hand_causally)
    ),
    network(
        "scaled_dot_product_attention",
        architecture=lambda: SelfAttention(F.scaled_dot_product_attention),
    ),
    network(
        "scaled_dot_product_attention_causal",
        architecture=lambda: SelfAttention(partial(F.scaled_dot_product_attention, is_causal=True)),
    ),
    network(
        "scaled_dot_product_attention_boolean_mask",
        architecture=lambda: SelfAttention(attend_with_boolean_mask),
    ),
    network(
        "scaled_dot_product_attention_float_mask",
        architecture=lambda: SelfAttention(attend_with_float_mask),
    ),
    network("attention_pooling", architecture=AttentionPooling),
    network("multihead_attention", architecture=MultiheadAttention),
    network("encoder_layer_batch_first_relu", architecture=lambda: Encoder(batch_first=True)),
    network("encoder_layer_time_first_gelu", architecture=lambda: Encoder(activation="gelu")),
    network(
        "encoder_stack_norm_first",
        architecture=lambda: Encoder(2, activation="gelu", norm_first=True, batch_first=True),
    ),
    network("decoder_layer_cross_attention", architecture=CrossAttention),
    network("performer", architecture=Performer),
]
