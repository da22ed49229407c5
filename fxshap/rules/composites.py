"""Operations that are made of others: replaced by their parts before the rewrite.

Each decomposition is called with the operator's own arguments and must return what it returns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxshap.rules.table import composite

aten = torch.ops.aten


@composite(aten.scaled_dot_product_attention.default)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T scale + mask) v (Vaswani et al. 2017, eq. 1); a row that sees nothing is 0."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if is_causal:
        size = scores.shape[-2:]
        seen = torch.ones(size, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(seen.logical_not(), -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(aten._safe_softmax(scores, -1), value)


@composite(aten.glu.default)
def glu(x: Tensor, dim: int = -1) -> Tensor:
    """A sigmoid(B) of the two halves (Dauphin et al. 2017)."""
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


@composite(aten.cosine_similarity.default)
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Sum of the product of the normalised vectors."""
    lengths = (torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
    unit1, unit2 = (x / length for x, length in zip((x1, x2), lengths, strict=True))
    product: Tensor = (unit1 * unit2).sum(dim)
    return product


@composite(aten.cdist.default, aten._cdist_forward.default)
def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Norms of all differences of two sets of points."""
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    distance: Tensor = torch.linalg.vector_norm(difference, ord=p, dim=-1)
    return distance


@composite(aten.floor_divide.default)
def floor_divide(self: Tensor, other: Tensor) -> Tensor:
    """The quotient rounded down, which autograd knows under this other name."""
    quotient: Tensor = self.div(other, rounding_mode="floor")
    return quotient


@composite(aten.addcdiv.default)
def addcdiv(self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """Self + value * tensor1 / tensor2."""
    return self + value * (tensor1 / tensor2)


@composite(aten.logaddexp.default)
def logaddexp(self: Tensor, other: Tensor) -> Tensor:
    """Logsumexp of two."""
    return torch.logsumexp(torch.stack(torch.broadcast_tensors(self, other)), 0)
