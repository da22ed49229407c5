"""Decompositions: operations that are replaced by other operations, each with its own rule.

A decomposition is called with the operator's own arguments and must return what the operator
returns. It has the operator's name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxshap.rules.core.registry import decomposition
from fxshap.rules.core.shapes import unsqueeze_dims

aten = torch.ops.aten


@decomposition(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
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
    """softmax(q k^T scale + mask) v (Vaswani et al. 2017, eq. 1).

    A query whose keys are all masked gives 0.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if is_causal:
        size = scores.shape[-2:]
        visible = torch.ones(size, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(visible.logical_not(), -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(aten._safe_softmax(scores, -1), value)


@decomposition(aten.glu.default)
def glu(x: Tensor, dim: int = -1) -> Tensor:
    """a * sigmoid(b), where a and b are the halves of x (Dauphin et al. 2017)."""
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


@decomposition(aten.cosine_similarity.default)
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The dot product of x1 / max(|x1|, eps) and x2 / max(|x2|, eps)."""
    norms = (torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
    unit1, unit2 = (x / norm for x, norm in zip((x1, x2), norms, strict=True))
    product: Tensor = (unit1 * unit2).sum(dim)
    return product


@decomposition(aten.hinge_embedding_loss.default)
def hinge_embedding_loss(
    self: Tensor, target: Tensor, margin: float = 1.0, reduction: int = 1
) -> Tensor:
    """self where the target is not -1, plus max(margin - self, 0) where it is not 1."""  # noqa: D403
    near = torch.where(target != -1, self, 0)
    loss = near + torch.where(target != 1, (margin - self).clamp_min(0), 0)
    return (loss, loss.mean(), loss.sum())[reduction]


@decomposition(aten.cdist.default, aten._cdist_forward.default)
def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """The p-norms of the differences of all pairs of points from two sets."""
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    distance: Tensor = torch.linalg.vector_norm(difference, ord=p, dim=-1)
    return distance


@decomposition(aten.floor_divide.default)
def floor_divide(self: Tensor, other: Tensor) -> Tensor:
    """self / other rounded down, by the operator that autograd supports."""
    quotient: Tensor = self.div(other, rounding_mode="floor")
    return quotient


@decomposition(aten.addcdiv.default)
def addcdiv(self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """self + value * tensor1 / tensor2."""  # noqa: D403
    return self + value * (tensor1 / tensor2)


@decomposition(aten.logaddexp.default)
def logaddexp(self: Tensor, other: Tensor) -> Tensor:
    """log(exp(self) + exp(other)): logsumexp of the two tensors, stacked."""  # noqa: D403
    return torch.logsumexp(torch.stack(torch.broadcast_tensors(self, other)), 0)


@decomposition(aten.argsort.default)
def argsort(self: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    """The indices of a sort, which :mod:`.ranking` relaxes."""
    return self.sort(dim, descending).indices


@decomposition(aten.argsort.stable)
def argsort_stable(
    self: Tensor, *, stable: bool, dim: int = -1, descending: bool = False
) -> Tensor:
    """The indices of a stable sort, which :mod:`.ranking` relaxes."""
    return self.sort(dim=dim, descending=descending, stable=stable).indices


@decomposition(aten.msort.default)
def msort(self: Tensor) -> Tensor:
    """The sorted values along the first dimension."""
    return self.sort(0).values if self.dim() else self


@decomposition(aten.angle.default)
def angle(self: Tensor) -> Tensor:
    """atan2(imag, real) of a complex number; pi for a negative real number and 0 for others."""
    if self.is_complex():
        of_complex: Tensor = torch.atan2(self.imag, self.real)
        return of_complex
    of_real: Tensor = (self < 0).to(self.dtype) * math.pi
    return of_real


@decomposition(aten.polar.default)
def polar(abs: Tensor, angle: Tensor) -> Tensor:
    """abs e^(i angle), by its real and its imaginary part."""  # noqa: D403
    return torch.complex(abs * torch.cos(angle), abs * torch.sin(angle))


@decomposition(aten.linalg_norm.default)
def linalg_norm(
    self: Tensor,
    ord: float | None = None,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A vector norm over one dimension or over all; otherwise a matrix norm."""
    dims = list(range(self.dim())) if dim is None else list(dim)
    if ord is None or len(dims) == 1:
        order = 2 if ord is None else ord
        norm: Tensor = torch.linalg.vector_norm(self, order, dims, keepdim, dtype=dtype)
    else:
        norm = linalg_matrix_norm(self, ord, dims, keepdim, dtype=dtype)
    return norm


@decomposition(aten.linalg_norm.ord_str)
def linalg_norm_str(
    self: Tensor,
    ord: str,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The Frobenius or the nuclear norm of matrices."""
    norm: Tensor = linalg_matrix_norm_str(self, ord, dim or [-2, -1], keepdim, dtype=dtype)
    return norm


@decomposition(aten.linalg_matrix_norm.default)
def linalg_matrix_norm(
    self: Tensor,
    ord: float,
    dim: list[int] | tuple[int, ...] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The largest or, for a negative order, the smallest of the numbers that the order selects.

    These are the sums of absolute values of rows (inf) or columns (1), or the singular values (2).
    """
    matrices = (self if dtype is None else self.to(dtype)).movedim(list(dim), (-2, -1))
    if abs(ord) == 2:
        values = torch.linalg.svdvals(matrices)
    else:
        values = matrices.abs().sum(-1 if math.isinf(ord) else -2)
    norm = values.amax(-1) if ord > 0 else values.amin(-1)
    return unsqueeze_dims(norm, sorted(d % self.dim() for d in dim)) if keepdim else norm


@decomposition(aten.linalg_matrix_norm.str_ord)
def linalg_matrix_norm_str(
    self: Tensor,
    ord: str = "fro",
    dim: list[int] | tuple[int, ...] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Frobenius: the vector norm of all entries; nuclear: the sum of the singular values."""
    if ord == "fro":
        frobenius: Tensor = torch.linalg.vector_norm(self, 2, dim, keepdim, dtype=dtype)
        return frobenius
    matrices = (self if dtype is None else self.to(dtype)).movedim(list(dim), (-2, -1))
    nuclear = torch.linalg.svdvals(matrices).sum(-1)
    return unsqueeze_dims(nuclear, sorted(d % self.dim() for d in dim)) if keepdim else nuclear


#: The identity element of each reduction.
IDENTITY = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "amax": -math.inf, "amin": math.inf}


@decomposition(aten.scatter_reduce.two)
def scatter_reduce(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Reduce over a matrix of all pairs of targets and sources along `dim`.

    A source that goes to another target is replaced by the identity element. The matrix has n x m
    entries for n targets and m sources.
    """
    if not self.dim():
        base, at, new = (value.reshape(1) for value in (self, index, src))
        reduced: Tensor = scatter_reduce(base, 0, at, new, reduce, include_self=include_self)
        return reduced.reshape(())
    dim %= self.dim()
    for other, size in enumerate(index.shape):
        src = src.narrow(other, 0, size)
    base, at, new = (value.movedim(dim, -1) for value in (self, index, src))
    selected = at.unsqueeze(-2) == torch.arange(base.shape[-1], device=at.device).unsqueeze(-1)
    new = torch.where(selected, new.unsqueeze(-2), IDENTITY[reduce])
    for other, size in enumerate(base.shape[:-1]):
        missing = size - at.shape[other]
        if missing:
            selected = append_slices(selected, other, missing, False)
            new = append_slices(new, other, missing, IDENTITY[reduce])
    count = selected.sum(-1)
    if include_self:
        new, count = torch.cat([base.unsqueeze(-1), new], -1), count + 1
    match reduce:
        case "prod":
            out = new.prod(-1)
        case "amax":
            out = new.amax(-1)
        case "amin":
            out = new.amin(-1)
        case _:
            out = new.sum(-1)
    if reduce == "mean":
        out = out / count.clamp_min(1)
    if not include_self:
        out = torch.where(count > 0, out, base)
    return out.movedim(-1, dim)


def append_slices(value: Tensor, dim: int, count: int, fill: float) -> Tensor:
    """Append `count` slices along `dim`, filled with one number."""
    size = [*value.shape[:dim], count, *value.shape[dim + 1 :]]
    return torch.cat([value, value.new_full(size, fill)], dim)


@decomposition(aten.scatter.reduce)
def scatter(self: Tensor, dim: int, index: Tensor, src: Tensor, *, reduce: str) -> Tensor:
    """The older form of ``scatter_reduce``, whose reductions are "add" and "multiply"."""
    if reduce == "add":
        return self.scatter_add(dim, index, src)
    product: Tensor = scatter_reduce(self, dim, index, src, "prod")
    return product


#: The numbers of the modes of ``aten.embedding_bag``; the sum is 0.
BAG_MEAN, BAG_MAX = 1, 2


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
    """Sum, mean or maximum of the embeddings of each bag.

    The other three results of the operator are placeholders: only autograd reads them.
    """
    count = offsets.shape[0] - int(include_last_offset)
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
        out = scatter_reduce(empty, 0, at, rows, "amax", include_self=False)
        out = torch.where(sizes > 0, out, 0.0)
    else:
        out = empty.index_add(0, bag, rows * counted)
        out = out / sizes.clamp_min(1) if mode == BAG_MEAN else out
    return out, bag, bag, bag


#: How the position of a quantile between two sorted values is rounded, by interpolation.
ROUND_POSITION = {"lower": torch.floor, "higher": torch.ceil, "nearest": torch.round}


@decomposition(aten.quantile.default, aten.quantile.scalar)
def quantile(
    self: Tensor,
    q: Tensor | float,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    interpolation: str = "linear",
) -> Tensor:
    """Interpolation between adjacent sorted values; several quantiles form the first dimension."""
    q = q.to(self) if isinstance(q, Tensor) else self.new_full((), q)
    values = (self.flatten() if dim is None else self.movedim(dim, -1)).sort(-1).values
    position = q * (values.shape[-1] - 1)
    if interpolation in ROUND_POSITION:
        position = ROUND_POSITION[interpolation](position)
    below, above = position.floor(), position.ceil()
    weight = torch.full_like(position, 0.5) if interpolation == "midpoint" else position - below
    low, high = (values.index_select(-1, at.reshape(-1).long()) for at in (below, above))
    out = low + (high - low) * weight.reshape(-1)
    if dim is not None:
        out = out.movedim(-1, 0)
        out = out.unsqueeze(1 + dim % self.dim()) if keepdim else out
    elif keepdim:
        out = out.reshape(*out.shape, *[1] * self.dim())
    return out if q.dim() else out.squeeze(0)


@decomposition(aten.broadcast_tensors.default)
def broadcast_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor expanded by itself: a result depends on no other tensor's values."""
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    return [tensor.expand(shape) for tensor in tensors]
