"""Models that take Python decisions on what is not explained: buffers, parameters, bound masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.networks.reports.report import Report

report = partial(Report, family="decisions")


class Habit(nn.Module):
    """A hidden layer, and what a function does with it and with what the model holds."""

    def __init__(self, body: Callable[..., Tensor], **held: Any) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(10, 8), nn.Linear(8, 3)
        self.body = body
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor, **bound: Any) -> Tensor:
        return self.body(self, torch.tanh(self.hidden(x)), **bound)


def initialized(model: Habit, h: Tensor) -> Tensor:
    """Codebooks and activation norms are initialised at the first batch."""
    if not model.ready:
        model.scale.data.copy_(1 / h.std(0))
        model.ready.fill_(True)
    return model.out(h * model.scale)


def highest(model: Habit, h: Tensor) -> Tensor:
    return h.topk(int(model.k)).values


def tempered(model: Habit, h: Tensor) -> Tensor:
    return torch.softmax(model.out(h) / float(model.temperature), 1)


def tempered_by_parameter(model: Habit, h: Tensor) -> Tensor:
    return model.out(h) * model.scale.exp().clamp(max=100.0).item()


def unless_all(model: Habit, h: Tensor, mask: Tensor) -> Tensor:
    if not mask.all():
        h = h.masked_fill(~mask, 0.0)
    return model.out(h)


def if_any(model: Habit, h: Tensor, mask: Tensor) -> Tensor:
    if (mask == 0).any():
        h = h * mask
    return model.out(h)


def up_to_the_longest(model: Habit, h: Tensor, mask: Tensor) -> Tensor:
    return torch.cumsum(h[:, : int(mask.sum(1).max())] ** 2, 1)[:, -3:]


def at_selected(model: Habit, h: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([h[:, int(i)].exp() for i in mask[0].nonzero()], 1)


def if_equal(model: Habit, h: Tensor) -> Tensor:
    shifted = not torch.equal(model.shift, torch.zeros(8))
    scaled = not torch.allclose(model.scale, torch.ones(8))
    h = h + model.shift if shifted else h
    return model.out(h * model.scale if scaled else h)


def split_by_sizes(model: Habit, h: Tensor) -> Tensor:
    return torch.stack([part.amax(1) for part in h.split(model.sizes.tolist(), 1)], 1)


def means_of_groups(model: Habit, h: Tensor) -> Tensor:
    groups = model.groups
    return torch.stack([h[:, groups == g].exp().mean(1) for g in groups.unique()], 1)


def sums_of_groups(model: Habit, h: Tensor) -> Tensor:
    count = int(model.groups.max()) + 1
    return h.new_zeros(len(h), count).index_add(1, model.groups, h.exp())


def with_arrays(model: Habit, h: Tensor) -> Tensor:
    h = h * torch.from_numpy(model.weights) + float(np.linalg.norm(model.shift.numpy()))
    return model.out(torch.tanh(h))


def task_flag(model: Habit, h: Tensor, is_t2v: Tensor) -> Tensor:
    """HunyuanVideo 1.5 drops the tokens of the image when the task is text to video."""
    if is_t2v:
        h = torch.zeros_like(h)[:, :4] + h[:, :4].sin()
        h = torch.cat([h, h], 1)
    return model.out(h)


def fixed_steps(model: Habit, h: Tensor) -> Tensor:
    """Euler's method on a grid of times, as the solvers of torchdiffeq use it."""
    assert (model.times[1:] > model.times[:-1]).all(), "t must be strictly increasing"
    for start, end in zip(model.times[:-1], model.times[1:], strict=True):
        h = h + (end - start) * torch.tanh(model.out(h) @ model.out.weight)
        if torch.equal(end, model.times[-1]):
            break
    return model.out(h)


def crf_score(model: Habit, h: Tensor, mask: Tensor) -> Tensor:
    """The normaliser of a conditional random field, which checks its mask."""
    if not mask[:, 0].all():
        raise ValueError("mask of the first timestep must all be on")
    emissions = model.out(h)[:, None] * torch.linspace(0.5, 1.5, 4)[:, None]
    score = emissions[:, 0]
    for step in range(1, 4):
        following = torch.logsumexp(score[:, :, None] + model.transitions, 1) + emissions[:, step]
        score = torch.where(mask[:, step, None], following, score)
    return torch.logsumexp(score, 1, keepdim=True)


def named_by_number(model: Habit, h: Tensor) -> Tensor:
    """The head of a task, by a name that is made of its number."""
    return {"task0": model.out(h), "task1": model.out(h).exp()}[f"task{model.task}"]


def at_only_one(model: Habit, h: Tensor) -> Tensor:
    """A loop over the elements that a mask selects, of which there is one."""
    y = model.out(h)
    for index in torch.where(model.used)[0]:
        y = y * h[:, index].exp()[:, None]
    return y


class Codebook(nn.Module):
    """Distances to a codebook whose used entries are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(10, 4)
        self.register_buffer("codes", torch.randn(6, 4))
        self.register_buffer("used", torch.tensor([True, True, False, True, False, True]))
        self.register_buffer("initted", torch.tensor([1.0]))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encoder(x))
        if not self.initted:
            raise RuntimeError("the codebook has no codes")
        codes = self.codes[self.used] if self.used.sum() < len(self.used) else self.codes
        return torch.softmax(-(torch.cdist(h, codes) ** 2), 1)


class MaskedEncoder(nn.Module):
    """A transformer with a causal mask, which torch compares with the one that it makes."""

    def __init__(self, decoder: bool) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        stack = nn.TransformerDecoder if decoder else nn.TransformerEncoder
        self.layers = stack(layer(4, 2, 8, dropout=0.0, batch_first=True), 1)
        self.embed, self.out = nn.Linear(2, 4), nn.Linear(4, 3)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(5))
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        if self.decoder:
            return self.out(self.layers(h, h.flip(1), tgt_mask=self.causal)[:, -1])
        return self.out(self.layers(h, mask=self.causal)[:, -1])


class SparseGraph(nn.Module):
    """A graph convolution with a sparse adjacency matrix."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        ring = torch.eye(5) + torch.eye(5).roll(1, 0) + torch.eye(5).roll(-1, 0)
        self.adjacency = ring.to_sparse(layout=layout)
        self.hidden, self.out = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([torch.sparse.mm(self.adjacency, row) for row in self.hidden(x)])
        return self.out(torch.tanh(h)).sum(1)


MASK = torch.tensor([[True, True, False, True, True, True, False, True]])

REPORTS = [
    report(name, architecture=architecture, source=source, bound=bound)
    for name, architecture, source, bound in (
        ("initialized_before", lambda: Habit(initialized, ready=torch.tensor(True),
            scale=nn.Parameter(torch.rand(8))), "activation norms of flows", {}),
        ("highest_of_buffer", lambda: Habit(highest, k=torch.tensor(3)), "k in a buffer", {}),
        ("tempered", lambda: Habit(tempered, temperature=torch.tensor(0.7)),
         "calibrated classifiers", {}),
        ("tempered_by_parameter", lambda: Habit(tempered_by_parameter,
            scale=nn.Parameter(torch.tensor(0.3))), "logit_scale of CLIP", {}),
        ("unless_all", lambda: Habit(unless_all), "masks in transformers", {"mask": MASK}),
        ("if_any", lambda: Habit(if_any), "masks in transformers", {"mask": MASK.float()}),
        ("up_to_the_longest", lambda: Habit(up_to_the_longest), "padded batches", {"mask": MASK}),
        ("at_selected", lambda: Habit(at_selected), "gates", {"mask": MASK}),
        ("if_equal", lambda: Habit(if_equal, shift=torch.rand(8), scale=torch.ones(8)),
         "torch.equal and allclose", {}),
        ("split_by_sizes", lambda: Habit(split_by_sizes, sizes=torch.tensor([2, 5, 1])),
         "sizes in a buffer", {}),
        ("means_of_groups", lambda: Habit(means_of_groups,
            groups=torch.tensor([0, 2, 0, 1, 1, 2, 2, 0])), "gene sets, TabNet", {}),
        ("sums_of_groups", lambda: Habit(sums_of_groups,
            groups=torch.tensor([0, 2, 0, 1, 1, 2, 2, 0])), "gene sets, TabNet", {}),
        ("with_arrays", lambda: Habit(with_arrays, weights=np.linspace(0.5, 2, 8, dtype="float32"),
            shift=torch.rand(8)), "NumPy arrays as constants", {}),
        ("task_flag", lambda: Habit(task_flag), "HunyuanVideo 1.5",
         {"is_t2v": torch.tensor(True)}),
        ("fixed_steps", lambda: Habit(fixed_steps, times=torch.linspace(0, 1, 4)),
         "torchdiffeq", {}),
        ("crf_score", lambda: Habit(crf_score, transitions=nn.Parameter(torch.rand(3, 3))),
         "pytorch-crf", {"mask": MASK[:, :4]}),
        ("crf_score_of_bytes", lambda: Habit(crf_score, transitions=nn.Parameter(torch.rand(3, 3))),
         "pytorch-crf, whose masks are bytes", {"mask": MASK[:, :4].byte()}),
        ("named_by_number", lambda: Habit(named_by_number, task=torch.tensor(1)),
         "heads by task", {}),
        ("at_only_one", lambda: Habit(at_only_one, used=torch.arange(8) == 3),
         "pruned features", {}),
        ("codebook", Codebook, "vector-quantize-pytorch", {}),
    )
] + [
    report("encoder_with_mask", architecture=lambda: MaskedEncoder(False), shapes=((5, 2),),
           source="nn.TransformerEncoder(mask=...)"),
    report("decoder_with_mask", architecture=lambda: MaskedEncoder(True), shapes=((5, 2),),
           source="nn.TransformerDecoder(tgt_mask=...)"),
    report("sparse_coo", architecture=lambda: SparseGraph(torch.sparse_coo), shapes=((5, 2),),
           source="pygcn"),
    report("sparse_csr", architecture=lambda: SparseGraph(torch.sparse_csr), shapes=((5, 2),),
           source="graph networks"),
]  # fmt: skip
