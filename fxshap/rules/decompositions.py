"""Operations that are made of others: replaced by their parts before the rewrite.

Each decomposition is called with the operator's own arguments and must return what it returns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxshap.rules.core.registry import decomposition

aten = torch.ops.aten


@decomposition(aten.scaled_dot_product_attention.default)
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


@decomposition(aten.glu.default)
def glu(x: Tensor, dim: int = -1) -> Tensor:
    """A sigmoid(B) of the two halves (Dauphin et al. 2017)."""
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


@decomposition(aten.cosine_similarity.default)
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Sum of the product of the normalised vectors."""
    lengths = (torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
    unit1, unit2 = (x / length for x, length in zip((x1, x2), lengths, strict=True))
    product: Tensor = (unit1 * unit2).sum(dim)
    return product


@decomposition(aten.cdist.default, aten._cdist_forward.default)
def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Norms of all differences of two sets of points."""
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    distance: Tensor = torch.linalg.vector_norm(difference, ord=p, dim=-1)
    return distance


@decomposition(aten.floor_divide.default)
def floor_divide(self: Tensor, other: Tensor) -> Tensor:
    """The quotient rounded down, which autograd knows under this other name."""
    quotient: Tensor = self.div(other, rounding_mode="floor")
    return quotient


@decomposition(aten.addcdiv.default)
def addcdiv(self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """Self + value * tensor1 / tensor2."""
    return self + value * (tensor1 / tensor2)


@decomposition(aten.logaddexp.default)
def logaddexp(self: Tensor, other: Tensor) -> Tensor:
    """Logsumexp of two."""
    return torch.logsumexp(torch.stack(torch.broadcast_tensors(self, other)), 0)


@decomposition(aten.argsort.default)
def argsort(self: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    """The indices of a sort, whose ranks have a form (:mod:`.ranking`)."""
    return self.sort(dim, descending).indices


@decomposition(aten.argsort.stable)
def stable_argsort(
    self: Tensor, *, stable: bool, dim: int = -1, descending: bool = False
) -> Tensor:
    """The indices of a stable sort."""
    return self.sort(dim=dim, descending=descending, stable=stable).indices


@decomposition(aten.angle.default)
def angle(self: Tensor) -> Tensor:
    """Of a complex number, atan2 of its parts; of a real one, pi below 0."""
    if self.is_complex():
        turned: Tensor = torch.atan2(self.imag, self.real)
        return turned
    below: Tensor = (self < 0).to(self.dtype) * math.pi
    return below


@decomposition(aten.linalg_norm.default)
def norm(
    self: Tensor,
    ord: float | None = None,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A vector norm of one dimension, or of everything; else a norm of matrices."""
    dims = list(range(self.dim())) if dim is None else list(dim)
    if ord is None or len(dims) == 1:
        order = 2 if ord is None else ord
        found: Tensor = torch.linalg.vector_norm(self, order, dims, keepdim, dtype=dtype)
    else:
        found = matrix_norm(self, ord, dims, keepdim, dtype=dtype)
    return found


@decomposition(aten.linalg_norm.ord_str)
def named_norm(
    self: Tensor,
    ord: str,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Frobenius and nuclear norms."""
    found: Tensor = named_matrix_norm(self, ord, dim or [-2, -1], keepdim, dtype=dtype)
    return found


@decomposition(aten.linalg_matrix_norm.default)
def matrix_norm(
    self: Tensor,
    ord: float,
    dim: list[int] | tuple[int, ...] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The largest or smallest sum of magnitudes of rows (inf) or columns (1), or singular value."""
    last = (self if dtype is None else self.to(dtype)).movedim(list(dim), (-2, -1))
    if abs(ord) == 2:
        values = torch.linalg.svdvals(last)
    else:
        values = last.abs().sum(-1 if math.isinf(ord) else -2)
    found = values.amax(-1) if ord > 0 else values.amin(-1)
    return with_dims(found, dim, self.dim()) if keepdim else found


@decomposition(aten.linalg_matrix_norm.str_ord)
def named_matrix_norm(
    self: Tensor,
    ord: str = "fro",
    dim: list[int] | tuple[int, ...] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Frobenius: the vector norm of all entries; nuclear: the sum of the singular values."""
    if ord == "fro":
        length: Tensor = torch.linalg.vector_norm(self, 2, dim, keepdim, dtype=dtype)
        return length
    last = (self if dtype is None else self.to(dtype)).movedim(list(dim), (-2, -1))
    found = torch.linalg.svdvals(last).sum(-1)
    return with_dims(found, dim, self.dim()) if keepdim else found


def with_dims(value: Tensor, dims: list[int] | tuple[int, ...], count: int) -> Tensor:
    """Put reduced dimensions of a tensor of `count` dimensions back as ones."""
    for place in sorted(d % count for d in dims):
        value = value.unsqueeze(place)
    return value


#: What changes nothing, for each reduction.
NEUTRAL = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "amax": -math.inf, "amin": math.inf}


@decomposition(aten.scatter_reduce.two)
def scatter_reduce(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Reduce, at every place, what goes there; all of which is written out: n x m values a row."""
    if not self.dim():
        base, at, new = (value.reshape(1) for value in (self, index, src))
        whole: Tensor = scatter_reduce(base, 0, at, new, reduce, include_self=include_self)
        return whole.reshape(())
    dim %= self.dim()
    for other, size in enumerate(index.shape):
        src = src.narrow(other, 0, size)
    base, at, new = (value.movedim(dim, -1) for value in (self, index, src))
    goes = at.unsqueeze(-2) == torch.arange(base.shape[-1], device=at.device).unsqueeze(-1)
    new = torch.where(goes, new.unsqueeze(-2), NEUTRAL[reduce])
    for other, size in enumerate(base.shape[:-1]):
        more = size - at.shape[other]
        if more:
            goes, new = grown(goes, other, more, False), grown(new, other, more, NEUTRAL[reduce])
    count = goes.sum(-1)
    if include_self:
        new, count = torch.cat([base.unsqueeze(-1), new], -1), count + 1
    match reduce:
        case "prod":
            found = new.prod(-1)
        case "amax":
            found = new.amax(-1)
        case "amin":
            found = new.amin(-1)
        case _:
            found = new.sum(-1)
    if reduce == "mean":
        found = found / count.clamp_min(1)
    if not include_self:
        found = torch.where(count > 0, found, base)
    return found.movedim(-1, dim)


@decomposition(aten.scatter.reduce)
def scatter_with(self: Tensor, dim: int, index: Tensor, src: Tensor, *, reduce: str) -> Tensor:
    """A ``scatter_reduce`` by its older names."""
    if reduce == "add":
        return self.scatter_add(dim, index, src)
    product: Tensor = scatter_reduce(self, dim, index, src, "prod")
    return product


@decomposition(aten.embedding_bag.default, aten.embedding_bag.padding_idx)
def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embed, and reduce bag by bag; nobody reads the three other results of the operator."""
    count = offsets.shape[0] - include_last_offset
    order = torch.arange(indices.shape[0], device=indices.device)
    bag = torch.searchsorted(offsets[:count].to(order), order, right=True) - 1
    rows = torch.embedding(weight, indices)
    counted = torch.ones_like(rows[:, :1])
    if padding_idx is not None:
        counted = (indices != padding_idx).to(rows).unsqueeze(-1)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    sizes = rows.new_zeros(count, 1).index_add(0, bag, counted)
    empty = rows.new_zeros(count, rows.shape[1])
    if mode == BAG_MAX:
        rows = torch.where(counted > 0, rows, -math.inf)
        at = bag.unsqueeze(-1).expand(rows.shape)
        found = scatter_reduce(empty, 0, at, rows, "amax", include_self=False)
        found = torch.where(sizes > 0, found, 0.0)
    else:
        found = empty.index_add(0, bag, rows * counted)
        found = found / sizes.clamp_min(1) if mode == BAG_MEAN else found
    return found, bag, bag, bag


#: How ``aten.embedding_bag`` numbers its modes; 0 is the sum.
BAG_MEAN, BAG_MAX = 1, 2


def grown(value: Tensor, dim: int, more: int, fill: float) -> Tensor:
    """Add slices filled with one number."""
    size = [*value.shape[:dim], more, *value.shape[dim + 1 :]]
    return torch.cat([value, value.new_full(size, fill)], dim)


@decomposition(aten.quantile.default, aten.quantile.scalar)
def quantile(
    self: Tensor,
    q: Tensor | float,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    interpolation: str = "linear",
) -> Tensor:
    """Values in order, and between two of them; several quantiles are the first dimension."""
    q = q.to(self) if isinstance(q, Tensor) else self.new_full((), q)
    last = (self.flatten() if dim is None else self.movedim(dim, -1)).sort(-1).values
    place = q * (last.shape[-1] - 1)
    if interpolation in ("lower", "higher", "nearest"):
        place = {"lower": torch.floor, "higher": torch.ceil, "nearest": torch.round}[interpolation](
            place
        )
    below, above = place.floor(), place.ceil()
    way = torch.full_like(place, 0.5) if interpolation == "midpoint" else place - below
    low, high = (last.index_select(-1, at.reshape(-1).long()) for at in (below, above))
    found = low + (high - low) * way.reshape(-1)
    if dim is not None:
        found = found.movedim(-1, 0)
        found = found.unsqueeze(1 + dim % self.dim()) if keepdim else found
    elif keepdim:
        found = found.reshape(*found.shape, *[1] * self.dim())
    return found if q.dim() else found.squeeze(0)
