"""Coalition refinement: nearer to the exact Shapley values than one pass, and as additive.

The features are put in an order that is cut into blocks. The backward passes go from the reference
to the sample in segments, each of which switches one block. Every feature gets the multipliers of
the segment that switched it. This is exactly additive, because the differences telescope. The same
blocks are also used in the reversed order, so that both endpoints count alike. With two blocks, a
chain is a coalition and its complement.

A pass errs in how it shares among the features that it switches together. One pass switches all
pairs of features together, a chain only the share P of the pairs that lie within a block. The
change that the chains have made is therefore extrapolated:

    phi = chains + w (chains - one pass),  w = trust P / (1 - P)

This is as additive, because the weights sum to one. It also magnifies the variance that comes from
drawing the blocks, so `trust` grows with the number of chains. The page on refinement in the
documentation lists what was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxshap._compat import parity
from fxshap.autograd.tape import Multipliers, Taps
from fxshap.runtime.features import differing_features, spread_features
from fxshap.runtime.refinement import Refinement

#: A number for every feature, or a mask of them: one tensor per input, which broadcasts to it.
Features = list[Tensor]

#: A chain has L blocks once there are LONGER * L**3 pairs of coalitions over all references. Longer
#: chains are nearer, but there are fewer of them in the same time, and their variance is larger.
LONGER = 2
#: The largest trust in the change from one pass, and the number of chains that earns half of it.
MAX_TRUST, HALF_TRUST = 0.6, 24


@dataclass(frozen=True)
class CoalitionChains:
    """The chains of one call.

    Attributes
    ----------
    blocks : int
        How many blocks a chain has.
    drawn : list of (list of Tensor)
        For every chain the block of each feature, counted from 0.
    weight : Tensor or None
        For every reference, the weight w of the extrapolation; ``None`` without one.
    """

    blocks: int
    drawn: list[Features]
    weight: Tensor | None

    def of(self, rows: slice) -> CoalitionChains:
        """Return the chains of some of the references."""
        drawn = [[block[rows] for block in chain] for chain in self.drawn]
        weight = None if self.weight is None else self.weight[rows]
        return replace(self, drawn=drawn, weight=weight)

    @property
    def backward_passes(self) -> int:
        """How many backward passes the chains take."""
        return 2 * self.blocks * len(self.drawn) + self.needs_one_pass

    @property
    def needs_one_pass(self) -> bool:
        """Whether one pass over all features is needed too."""
        return self.weight is not None or not self.drawn


def draw_chains(
    refinement: Refinement, samples: Sequence[Tensor], references: Sequence[Tensor]
) -> CoalitionChains:
    """Draw the chains of one call, the same for the same inputs.

    Parameters
    ----------
    refinement : Refinement
    samples, references : sequence of Tensor
        One tensor per input, of shapes (rows or 1, ...) and (rows, ...).
    """
    numbers, pairs = refinement.features(references), refinement.pairs
    if not pairs:
        return CoalitionChains(1, [], None)
    differ = differing_features(samples, references, numbers)
    blocks = blocks_of_chain(pairs, len(differ), int(differ.sum(1).max()))
    chains = 2 * pairs // blocks
    rows = balanced_scores(differ.shape[1], blocks, np.random.default_rng(refinement.seed))
    drawn = [draw_blocks(differ, blocks, rows) for _ in range(chains)]
    together = share_together(differ.sum(1), blocks)
    total = chains * len(differ)
    # The variance of one chain per reference is too large: some networks were then farther.
    trust = MAX_TRUST * total / (total + HALF_TRUST) if chains > 1 else 0.0
    return CoalitionChains(
        blocks,
        [
            [
                spread_features(chain, number).to(r.device)
                for number, r in zip(numbers, references, strict=True)
            ]
            for chain in drawn
        ],
        trust * together / (1 - together) if trust and together.any() else None,
    )


def blocks_of_chain(pairs: int, references: int, features: int) -> int:
    """Return how many blocks a chain has, at most as many as there are features.

    Examples
    --------
    >>> [blocks_of_chain(k, 16, 10) for k in (1, 4, 8, 64, 1024)]
    [2, 2, 4, 8, 10]
    """
    blocks = 2
    while LONGER * (2 * blocks) ** 3 <= pairs * references and blocks < features:
        blocks *= 2
    return max(min(blocks, features, 2 * pairs), 2)


def count_passes(pairs: int, references: int, features: int) -> tuple[int, int]:
    """Return how many backward passes, and how many runs of hybrids, pairs of coalitions take.

    Examples
    --------
    >>> count_passes(1, references=16, features=10), count_passes(8, references=16, features=10)
    ((5, 2), (33, 24))
    """
    blocks = blocks_of_chain(pairs, references, features)
    chains = 2 * pairs // blocks
    return 2 * blocks * chains + 1, 2 * (blocks - 1) * chains


def share_together(features: Tensor, blocks: int) -> Tensor:
    """Return the share of the pairs of features that are in one block, of blocks of even size.

    Examples
    --------
    >>> share_together(torch.tensor([1, 2, 3, 10]), 2)
    tensor([0.0000, 0.0000, 0.3333, 0.4444])
    """
    size, larger = features // blocks, features % blocks
    together = larger * (size + 1) * size + (blocks - larger) * size * (size - 1)
    return together / (features * (features - 1)).clamp(min=1)


def balanced_scores(
    features: int, blocks: int, rng: np.random.Generator
) -> Iterator[NDArray[np.float64]]:
    """Yield scores of the features that separate all pairs of features equally often.

    The halves above and below the median are rows of a Hadamard matrix (of Sylvester's form: the
    sign at (i, j) is the parity of the bits that i and j share), in which all columns are
    orthogonal. The halves within the halves are other rows, and so on. When all rows have been
    used, the features get other columns.
    """
    size = 1 << features.bit_length()
    halvings = [0.5**level for level in range((blocks - 1).bit_length())]
    while True:
        columns = rng.permutation(size)[:features]
        orders = [rng.permutation(size - 1) + 1 for _ in halvings]
        for rows in zip(*orders, strict=True):
            signs = (1 - 2.0 * parity(row & columns) for row in rows)
            yield sum(
                (half * sign for half, sign in zip(halvings, signs, strict=True)),
                start=halvings[-1] * rng.random(features),  # decides uneven halves
            )


def draw_blocks(differ: Tensor, blocks: int, scores: Iterator[NDArray[np.float64]]) -> Tensor:
    """Put the features that differ into blocks of equal size, and the others into the last block.

    Parameters
    ----------
    differ : Tensor
        Booleans of shape (references, features).
    blocks : int
    scores : iterator
        Yields the scores of the features for one reference after another.

    Returns
    -------
    Tensor
        The block of every feature, counted from 0, of shape (references, features).
    """
    drawn = torch.from_numpy(np.stack(list(islice(scores, len(differ)))))
    order = drawn.masked_fill_(~differ, torch.inf).argsort(dim=1, stable=True)
    count = differ.sum(1, keepdim=True).clamp(min=1)
    block = (torch.arange(differ.shape[1]) * blocks // count).clamp(max=blocks - 1)
    return torch.empty(differ.shape, dtype=torch.uint8).scatter_(1, order, block.to(torch.uint8))


@dataclass(frozen=True)
class CoalitionPasses:
    """The functions and endpoints that refinement needs.

    Attributes
    ----------
    tapped : callable
        Returns the taps of each of several points.
    backward : callable
        ``backward(start, end)`` returns the multipliers between the taps of two points.
    samples, references : sequence of Tensor
        The two endpoints, one tensor per input.
    sample, reference : dict of str to Tensor
        Their taps.
    """

    tapped: Callable[[list[list[Tensor]]], list[Taps]]
    backward: Callable[[Taps, Taps], Multipliers]
    samples: Sequence[Tensor]
    references: Sequence[Tensor]
    sample: Taps
    reference: Taps

    def hybrid(self, order: Features, last: int) -> list[Tensor]:
        """Return the reference with the blocks up to `last` from the sample."""
        return [
            torch.where(block <= last, x, r)
            for block, x, r in zip(order, self.samples, self.references, strict=True)
        ]


def refined_multipliers(passes: CoalitionPasses, chains: CoalitionChains) -> Multipliers:
    """Return the multipliers of the chains, extrapolated from one pass; or those of one pass."""
    if not chains.drawn:
        return passes.backward(passes.reference, passes.sample)
    refined = mean_of_chains(passes, chains)
    if chains.weight is None:
        return refined
    one_pass = passes.backward(passes.reference, passes.sample)
    for mean, one in zip(refined, one_pass, strict=True):
        for a, b in zip(mean, one, strict=True):
            weight = chains.weight.to(a).reshape(-1, *[1] * (a.dim() - 1))
            a.add_(weight * (a - b))
    return refined


def mean_of_chains(passes: CoalitionPasses, chains: CoalitionChains) -> Multipliers:
    """Average the multipliers over the chains, each in both orders."""
    totals: Multipliers = []
    for drawn in chains.drawn:
        orders = drawn, [chains.blocks - 1 - block for block in drawn]
        start_taps = [passes.reference] * 2
        for last in range(chains.blocks):
            end_taps = (
                [passes.sample] * 2
                if last == chains.blocks - 1
                else passes.tapped([passes.hybrid(order, last) for order in orders])
            )
            for order, start, end in zip(orders, start_taps, end_taps, strict=True):
                multipliers = passes.backward(start, end)
                totals = totals or [[torch.zeros_like(a) for a in inputs] for inputs in multipliers]
                for total, inputs in zip(totals, multipliers, strict=True):
                    for sum_, a, block in zip(total, inputs, order, strict=True):
                        sum_ += torch.where(block == last, a, 0.0)
            start_taps = end_taps
    return [[sum_.div_(2 * len(chains.drawn)) for sum_ in total] for total in totals]
