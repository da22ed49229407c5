"""Coalition refinement: nearer to the exact Shapley values than one pass, and as additive.

Let S be half of the features and m the hybrid with S from the sample and the rest from the
reference. Walking reference -> m and m -> sample, and giving the features of S the multipliers of
the first walk and the others those of the second, adds up exactly: the differences telescope.
Averaging with the complement of S makes the two halves symmetric. More pairs converge to the
Shapley values of a game whose halves are explained by one pass each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxshap.errors import InputError, OptionError

FeatureDims = Sequence[int] | Sequence[Sequence[int] | None] | None
#: For every cotangent the multipliers of each input.
Found = list[list[Tensor]]
WalkThrough = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Found, Found]]


@dataclass(frozen=True)
class Refinement:
    """How to refine.

    Attributes
    ----------
    pairs : int
        Complementary pairs of coalitions for every reference; 0 for one pass.
    seed : int
        Seed of the coalitions.
    feature_dims : sequence of int, or of one such sequence an input, optional
        The dimensions of an input that index features.
    """

    pairs: int = 0
    seed: int = 0
    feature_dims: FeatureDims = None

    def __post_init__(self) -> None:
        if not isinstance(self.pairs, int) or self.pairs < 0:
            raise OptionError(f"refine counts pairs of coalitions, 0 or more, not {self.pairs!r}")

    def draw(self, samples: Sequence[Tensor], references: Sequence[Tensor]) -> list[list[Tensor]]:
        """Draw the coalitions of one call, the same for the same inputs."""
        generator = torch.Generator().manual_seed(self.seed)
        dims = dims_of_inputs(references, self.feature_dims)
        return [draw_coalition(samples, references, dims, generator) for _ in range(self.pairs)]


ONE_PASS = Refinement()


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
    found = tuple(d % x.dim() for d in dims if -x.dim() <= d < x.dim())
    if len(found) != len(dims) or 0 in found or not found:
        raise InputError(
            f"feature_dims={tuple(dims)} are not dimensions of an input of shape {tuple(x.shape)} "
            "that index features; dimension 0 is the batch"
        )
    return found


def draw_coalition(
    samples: Sequence[Tensor],
    references: Sequence[Tensor],
    dims: Sequence[tuple[int, ...]],
    generator: torch.Generator,
) -> list[Tensor]:
    """Draw for every row a random half of the features that differ, over all inputs together.

    Parameters
    ----------
    samples, references : sequence of Tensor
        One tensor an input, of shapes (rows or 1, ...) and (rows, ...).
    dims : sequence of tuple of int
        The dimensions of each input that index features.
    generator : torch.Generator
        On the CPU, whatever the device of the inputs.

    Returns
    -------
    list of Tensor
        One boolean mask an input, which broadcasts against it: True where S takes the sample.
    """
    differ = [
        any_over(x != r, [d for d in range(1, r.dim()) if d not in keep])
        for x, r, keep in zip(samples, references, dims, strict=True)
    ]
    flat = torch.cat([mask.flatten(1) for mask in differ], 1)
    scores = torch.rand(flat.shape, generator=generator).to(flat.device)
    rank = scores.masked_fill(~flat, 2.0).argsort(1).argsort(1)
    chosen = flat & (rank < flat.sum(1, keepdim=True) // 2)
    sizes = [mask[0].numel() for mask in differ]
    return [
        part.reshape(mask.shape) for part, mask in zip(chosen.split(sizes, 1), differ, strict=True)
    ]


def any_over(mask: Tensor, dims: list[int]) -> Tensor:
    """Logical or over dimensions, kept as ones; with no dimensions the mask itself."""
    return mask.any(dims, keepdim=True) if dims else mask


def refined_multipliers(
    walk_through: WalkThrough,
    samples: Sequence[Tensor],
    references: Sequence[Tensor],
    coalitions: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
) -> Found:
    """Average over coalitions and their complements the multipliers of the two walks.

    Parameters
    ----------
    walk_through : callable
        ``walk_through(hybrid, grads)`` returns the multipliers reference -> hybrid and
        hybrid -> sample.
    samples, references : sequence of Tensor
    coalitions : sequence of (sequence of Tensor)
        Masks as :func:`draw_coalition` returns them.
    grads : sequence of Tensor
        Cotangents of the output.
    """
    totals = [[torch.zeros_like(r) for r in references] for _ in grads]
    for drawn in coalitions:
        for chosen in (drawn, [~mask for mask in drawn]):
            hybrid = [
                torch.where(s, x, r) for s, x, r in zip(chosen, samples, references, strict=True)
            ]
            for total, first, second in zip(totals, *walk_through(hybrid, grads), strict=True):
                for sum_, s, a, b in zip(total, chosen, first, second, strict=True):
                    sum_ += torch.where(s, a, b)
    return [[sum_ / (2 * len(coalitions)) for sum_ in total] for total in totals]
