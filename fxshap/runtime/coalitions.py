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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxshap._compat import parity
from fxshap.autograd.tape import Multipliers, Taps
from fxshap.errors import InputError, OptionError

FeatureDims = Sequence[int] | Sequence[Sequence[int] | None] | None
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
    weight : Tensor
        For every reference, the weight w of the extrapolation.
    """

    blocks: int
    drawn: list[Features]
    weight: Tensor

    def of(self, rows: slice) -> CoalitionChains:
        """Return the chains of some of the references."""
        drawn = [[block[rows] for block in chain] for chain in self.drawn]
        return replace(self, drawn=drawn, weight=self.weight[rows])

    @property
    def backward_passes(self) -> int:
        """How many backward passes the chains take."""
        return 2 * self.blocks * len(self.drawn) + self.needs_one_pass

    @property
    def needs_one_pass(self) -> bool:
        """Whether one pass over all features is needed too."""
        return bool(self.weight.any()) or not self.drawn


@dataclass(frozen=True)
class Refinement:
    """How to refine: how many coalitions to draw, and of what.

    Attributes
    ----------
    pairs : int
        Complementary pairs of coalitions for every reference, or as many backward passes in longer
        chains; 0 for one pass.
    seed : int
        Seed of the coalitions: the same call gives the same values.
    feature_dims : sequence of int, or of one such sequence per input, optional
        The dimensions of an input, counted with the batch as 0, that index its features. What
        differs in other dimensions, such as the channels of a pixel or the embedding of a token, is
        one feature. By default (2, 3) for 4-d inputs, otherwise all. For token embeddings of shape
        (rows, tokens, width) and one-hot sequences it is (1,) or (2,).

    Raises
    ------
    OptionError
        If `pairs` is not a number, or `seed` is given without coalitions to draw.

    Examples
    --------
    >>> import torch, fxshap
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU())
    >>> explainable = fxshap.make_explainable(model, refine=fxshap.Refinement(4, seed=1))
    """

    pairs: int
    seed: int = 0
    feature_dims: FeatureDims = None

    def __post_init__(self) -> None:
        if not isinstance(self.pairs, int) or isinstance(self.pairs, bool) or self.pairs < 0:
            raise OptionError(f"refine counts pairs of coalitions, 0 or more, not {self.pairs!r}")
        if self.seed and not self.pairs:
            raise OptionError("seed has no effect without coalitions; give pairs of 1 or more")

    def draw(self, samples: Sequence[Tensor], references: Sequence[Tensor]) -> CoalitionChains:
        """Draw the chains of one call, the same for the same inputs.

        Parameters
        ----------
        samples, references : sequence of Tensor
            One tensor per input, of shapes (rows or 1, ...) and (rows, ...).
        """
        dims = dims_of_inputs(references, self.feature_dims)
        if not self.pairs:
            return CoalitionChains(1, [], torch.zeros(len(references[0])))
        differ = [
            any_over(x != r, [d for d in range(1, r.dim()) if d not in keep])
            for x, r, keep in zip(samples, references, dims, strict=True)
        ]
        flat = torch.cat([mask.flatten(1) for mask in differ], 1).cpu()
        blocks = blocks_of_chain(self.pairs, len(flat), int(flat.sum(1).max()))
        chains = 2 * self.pairs // blocks
        rows = balanced_scores(flat.shape[1], blocks, np.random.default_rng(self.seed))
        drawn = [draw_blocks(flat, blocks, rows) for _ in range(chains)]
        sizes = [mask[0].numel() for mask in differ]
        together = share_together(flat.sum(1), blocks)
        total = chains * len(flat)
        # The variance of one chain per reference is too large: some networks were then farther.
        trust = MAX_TRUST * total / (total + HALF_TRUST) if chains > 1 else 0.0
        return CoalitionChains(
            blocks,
            [
                [
                    part.reshape(mask.shape).to(mask.device)
                    for part, mask in zip(chain.split(sizes, 1), differ, strict=True)
                ]
                for chain in drawn
            ],
            trust * together / (1 - together),
        )


ONE_PASS = Refinement(0)


def default_dims(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions that index features: pixels of an image, else every element."""
    return (2, 3) if x.dim() == 4 else tuple(range(1, x.dim()))


def dims_of_inputs(inputs: Sequence[Tensor], feature_dims: FeatureDims) -> list[tuple[int, ...]]:
    """Return the feature dimensions of every input, counted with the batch as dimension 0."""
    if feature_dims is None:
        return [default_dims(x) for x in inputs]
    given = [feature_dims] if isinstance(feature_dims[0], int) else feature_dims
    if len(given) != len(inputs):
        raise InputError(
            f"feature_dims describes {len(given)} inputs, but the model has {len(inputs)}; give "
            "one sequence of dimensions, or None, for each"
        )
    return [chosen_dims(x, dims) for x, dims in zip(inputs, given, strict=True)]


def chosen_dims(x: Tensor, dims: Any) -> tuple[int, ...]:
    """Check the feature dimensions of one input and count them from the front."""
    if dims is None:
        return default_dims(x)
    valid = tuple(d % x.dim() for d in dims if -x.dim() <= d < x.dim())
    if len(valid) != len(dims) or 0 in valid or not valid:
        raise InputError(
            f"feature_dims={tuple(dims)} are not dimensions of an input of shape {tuple(x.shape)} "
            "that index features; dimension 0 is the batch"
        )
    return valid


def any_over(mask: Tensor, dims: list[int]) -> Tensor:
    """Return the logical or over dimensions, which become 1; without any, the mask itself."""
    return mask.any(dims, keepdim=True) if dims else mask


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
    if not chains.needs_one_pass:
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
