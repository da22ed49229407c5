"""Indices that depend on the input: every way they come about and are used."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from fxshap.ops.library import ranks
from fxshap.rules.core.operation import Operation
from fxshap.rules.ranking import ranking
from tests.helpers import assert_exact

USES = {
    "index by argmax": lambda m, x: m.table[m.scores(x).argmax(1)],
    "index by max": lambda m, x: m.table[m.scores(x).max(1).indices],
    "index by the minimum of all": lambda m, x: m.table[
        m.scores(x).view(-1, 2, 4).min(2)[1]
    ].flatten(1),
    "index by kthvalue": lambda m, x: m.table[m.scores(x).kthvalue(3, 1).indices],
    "index by topk": lambda m, x: m.table[m.scores(x).topk(2, 1).indices].flatten(1),
    "index by the least, in any order": lambda m, x: m.table[
        m.scores(x).topk(2, 1, largest=False, sorted=False).indices
    ].sum(1),
    "second dimension by argmin": lambda m, x: m.table.T[:, m.scores(x).argmin(1)].T,
    "rows and columns": lambda m, x: m.scores(x)[
        torch.arange(len(x)), m.scores(x).tanh().argmax(1)
    ].unsqueeze(1),
    "index by a count": lambda m, x: m.table[(m.scores(x) > 0).sum(1) - 1],
    "index by a cast": lambda m, x: m.table[m.scores(x).tanh().mul(4).long().sum(1).clamp(0, 7)],
    "embedding": lambda m, x: m.embedding(m.scores(x).argmax(1)),
    "index_select": lambda m, x: m.table.index_select(0, m.scores(x).argmax(1)),
    "index_select from a table of numbers": lambda m, x: (
        m.table[:, 0].index_select(0, m.scores(x).argmax(1)).unsqueeze(1) * m.scores(x)
    ),
    "gather by topk": lambda m, x: x.sin().repeat(1, 2).gather(1, m.scores(x).topk(2, 1).indices),
    "gather by argsort": lambda m, x: m.scores(x).gather(1, m.scores(x).cos().argsort(1)),
    "gather from a longer table": lambda m, x: F.pad(m.scores(x), (0, 4)).gather(
        1, m.scores(x).argmax(1, keepdim=True)
    ),
    "take_along_dim": lambda m, x: torch.take_along_dim(
        m.scores(x).exp(), m.scores(x).sort(1, descending=True).indices, 1
    ),
    "scatter of a number": lambda m, x: (
        torch.zeros_like(m.scores(x)).scatter(1, m.scores(x).topk(3).indices, 1.0) * m.scores(x)
    ),
    "scatter of values": lambda m, x: m.scores(x).scatter(
        1, m.scores(x).cos().topk(3, 1).indices, x[:, :3].exp()
    ),
    "scatter to one position": lambda m, x: m.scores(x).scatter(
        1, m.scores(x)[:, :4].mul(3).long() % 3, x[:, :4].exp()
    ),
    "scatter of a number to one position": lambda m, x: (
        torch.zeros_like(m.scores(x)).scatter(1, m.scores(x)[:, :4].mul(3).long() % 3, 2.0)
        * m.scores(x)
    ),
    "scatter_add": lambda m, x: m.scores(x).scatter_add(
        1, m.scores(x).cos().topk(3, 1).indices, x[:, :3].exp()
    ),
    "one_hot": lambda m, x: F.one_hot(m.scores(x).argmax(1), 8).to(x.dtype) @ m.table,
    "as a number": lambda m, x: m.scores(x).argmax(1, keepdim=True).to(x.dtype) * x,
    "equal to a number": lambda m, x: torch.where(
        m.scores(x).argmax(1, keepdim=True) == 4, x.sin(), x.square()
    ),
    "not equal to a number": lambda m, x: (
        (m.scores(x).topk(2, 1).indices != 3) * m.scores(x)[:, :2]
    ),
    "equal to each candidate": lambda m, x: (
        (m.scores(x).argmax(1, keepdim=True) == torch.arange(8)) * m.scores(x)
    ),
    "equal to no candidate": lambda m, x: (m.scores(x).argmax(1, keepdim=True) == 9) + x.sin(),
    "compared": lambda m, x: torch.where(
        m.scores(x).argmax(1, keepdim=True) > 3, x.sin(), x.square()
    ),
    "of booleans": lambda m, x: m.table[(m.scores(x) > 0).float().argmax(1)],
}


class Chooser(nn.Module):
    """Scores of eight candidates, a table and an embedding to look them up in, and a use."""

    def __init__(self, use) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores = nn.Linear(6, 8)
        self.table = nn.Parameter(torch.randn(8, 5))
        self.embedding = nn.Embedding(8, 5)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_adds_up(use):
    model = Chooser(use).eval().double()
    torch.manual_seed(1)
    background, samples = [torch.randn(5, 6).double()], [torch.randn(3, 6).double()]
    outputs = model(torch.cat([background[0], samples[0]]))
    assert outputs.std(0).max() > 0.05  # there is something to explain
    assert_exact(model, fxshap.make_explainable(model), background, samples, 1e-12)


def brute_force(value, r: Tensor, x: Tensor) -> Tensor:
    """Shapley values of a game over all coalitions of elements that are at the sample."""
    n = len(r)
    phi = torch.zeros(n, dtype=torch.float64)
    for coalition in itertools.product([0, 1], repeat=n):
        inside = torch.tensor(coalition, dtype=torch.bool)
        worth, size = value(torch.where(inside, x, r)), sum(coalition)
        joins = 1 / (n * math.comb(n - 1, size - 1)) if size else 0.0
        lacks = 1 / (n * math.comb(n - 1, size)) if size < n else 0.0
        phi += torch.where(inside, joins * worth, -lacks * worth)
    return phi


@pytest.mark.parametrize(
    "order, lowest, count",
    [("argmax", 0, 1), ("argmin", 0, 1), ("topk", 0, 3), ("least", 0, 2), ("ascending", 0, 5)]
    + [("descending", 0, 5), ("kth", 2, 1)],
)
def test_ranks_have_their_exact_shapley_values(order, lowest, count):
    torch.manual_seed(0)
    for _ in range(10):
        r, x = torch.randn(2, 5, dtype=torch.float64)
        weight = torch.randn(count, 5, dtype=torch.float64)
        exact = brute_force(lambda s, w=weight: (w * ranks(s, order, lowest, count)).sum(), r, x)
        operation, _ = Operation.bind(
            torch.ops.fxshap.ranks.default, (r.unsqueeze(0), order, lowest, count)
        )
        (multiplier,) = ranking(operation, [r.unsqueeze(0)], [x.unsqueeze(0)], weight.unsqueeze(0))
        assert torch.allclose(multiplier[0] * (x - r), exact, rtol=0, atol=1e-12)


def test_the_order_of_an_unsorted_topk_is_free():
    model = Chooser(lambda m, x: m.scores(x).topk(3, 1, sorted=False).values.square().sum(1, True))
    background, samples = [torch.randn(5, 6)], [torch.randn(3, 6)]
    assert_exact(model.eval(), fxshap.make_explainable(model), background, samples, 1e-6)


def test_an_integer_as_a_boolean_is_true_if_not_zero():
    """A number above 1 counts as 1, and no more."""
    model = Chooser(lambda m, x: m.scores(x).mul(4).long().bool() * m.scores(x)).double()
    background, samples = torch.randn(5, 6).double(), torch.randn(3, 6).double()
    assert_exact(model, fxshap.make_explainable(model), [background], [samples], 1e-12)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_codes_in_bags_add_up(mode):
    """The maximum compares every row with every row: its taps grow in two dimensions."""

    def embedded(m, x):
        codes = m.scores(x).mul(3).long().clamp(-3, 4) + 3
        return F.embedding_bag(codes, m.table, mode=mode)

    model = Chooser(embedded).double()
    background, samples = torch.randn(5, 6).double(), torch.randn(3, 6).double()
    assert_exact(model, fxshap.make_explainable(model), [background], [samples], 1e-12)
