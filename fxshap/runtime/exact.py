"""Multipliers that give the exact Shapley values: the difference quotients of the features' values.

A library multiplies the multipliers by the difference d of sample and reference. So an element that
is a feature by itself has the multiplier phi / d. The game gives one value to a feature of several
elements, such as a token or a patch. It is shared among them in proportion to their squared
differences, m = phi d / sum d^2: of all multipliers that sum to phi, these have the smallest norm,
none has the other sign, and elements that do not differ have none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fxshap.autograd.tape import Multipliers
from fxshap.errors import OptionError
from fxshap.runtime.batching import BatchLayout, batched_bytes
from fxshap.runtime.features import differing_features, spread_features
from fxshap.runtime.program import Program
from fxshap.runtime.progress import progress_bar
from fxshap.runtime.refinement import MAX_GROUPS, Refinement
from fxshap.runtime.shapley import count_batches, shapley_values_of_pairs


class ExactGame:
    """The coalition games of sample-reference pairs; each is evaluated once, for all outputs.

    Parameters
    ----------
    program : Program
    layout : BatchLayout
    refinement : Refinement
        Defines the features.
    samples : sequence of Tensor
        One tensor per explained input, of shape (pairs or 1, ...).
    references : sequence of Tensor
        One tensor per input of the program, of shape (pairs, ...).
    progress : bool
        Whether slow work shows a progress bar.

    Attributes
    ----------
    players : Tensor
        Booleans of shape (pairs, features): the features that differ within a pair.
    """

    def __init__(
        self,
        program: Program,
        layout: BatchLayout,
        refinement: Refinement,
        samples: Sequence[Tensor],
        references: Sequence[Tensor],
        progress: bool = False,
    ) -> None:
        self.program = program
        self.refinement = refinement
        self.samples = samples
        self.references = references
        self.progress = progress
        explained = references[: program.explained]
        self.numbers = refinement.features(explained)
        self.players = differing_features(samples, explained, self.numbers)
        row = max(layout.largest, *(r[:1].nbytes for r in references))
        self.batch_size = max(batched_bytes(references[0].device) // row, 1)

    @property
    def largest(self) -> int:
        """The largest number of features that differ within a pair."""
        return int(self.players.sum(1).max())

    @property
    def rows(self) -> float:
        """How many rows of the model have to be evaluated; infinity where a float overflows."""
        return float(torch.exp2(self.players.sum(1).double()).sum())

    def seconds_per_row(self) -> float:
        """Measure how long one row takes, in one batch of the largest game."""
        counts = self.players.sum(1)
        pair = int(counts.argmax())
        count = min(int(counts[pair]), self.batch_size.bit_length() - 1)
        players = self.players[pair : pair + 1] & (self.players[pair].cumsum(0) <= count)
        samples = [x if len(x) == 1 else x[pair : pair + 1] for x in self.samples]
        references = [r[pair : pair + 1] for r in self.references]
        seconds = []
        for _ in range(2):  # the first run is slower
            start = time.perf_counter()
            shapley_values_of_pairs(
                self.program.output, samples, references, self.numbers, players, self.batch_size
            )
            seconds.append(time.perf_counter() - start)
        return min(seconds) / float(2**count)

    def check_affordable(self) -> None:
        """Raise an OptionError if too many features differ, with what it would cost."""
        if self.largest <= (self.refinement.max_groups or MAX_GROUPS):
            return
        seconds = self.seconds_per_row()
        raise OptionError(
            "refine='exact' evaluates all coalitions of the features that differ between a sample "
            f"and a reference; here {self.largest} differ, so it would take "
            f"{describe_rows(self.rows)} and {describe_seconds(seconds * self.rows)} for this "
            "sample. Group elements into at most "
            f"{self.refinement.max_groups or MAX_GROUPS} features with feature_dims= or "
            "feature_mask= of fxshap.Refinement, use refine=8 or refine='auto', or allow it with "
            f"Refinement('exact', max_groups={self.largest})"
        )

    @cached_property
    def values(self) -> Tensor:
        """The Shapley values, float64 of shape (pairs, features, outputs)."""
        steps = count_batches(self.players, self.batch_size)
        with progress_bar("fxshap evaluates coalitions", self.progress, steps) as step:
            return shapley_values_of_pairs(
                self.program.output,
                self.samples,
                self.references,
                self.numbers,
                self.players,
                self.batch_size,
                step,
            )

    @cached_property
    def shares(self) -> list[Tensor]:
        """For every element of the inputs, d / sum d^2 over its feature; 0 where d is 0."""
        pairs = list(zip(self.samples, self.references, self.numbers, strict=False))
        differences = [(x - r).cpu().double() for x, r, _ in pairs]
        groups = [number.expand(1, *r.shape[1:]).flatten() for _, r, number in pairs]
        # Divided by the largest of each feature, so that squares neither overflow nor underflow.
        largest = torch.zeros(self.players.shape, dtype=torch.float64)
        for d, group in zip(differences, groups, strict=True):
            largest.scatter_reduce_(1, group.expand(len(d), -1), d.abs().flatten(1), "amax")
        largest.masked_fill_(largest == 0, 1.0)
        squares = torch.zeros_like(largest)
        scaled = [
            d / spread_features(largest, n) for d, (_, _, n) in zip(differences, pairs, strict=True)
        ]
        for s, group in zip(scaled, groups, strict=True):
            squares.scatter_add_(1, group.expand(len(s), -1), s.square().flatten(1))
        squares.masked_fill_(squares == 0, 1.0)
        return [
            (s / spread_features(largest * squares, number)).to(r.device)
            for s, (_, r, number) in zip(scaled, pairs, strict=True)
        ]

    def backward_many(self, grads: Sequence[Tensor]) -> Multipliers:
        """Return for every cotangent the multipliers of every input.

        Parameters
        ----------
        grads : sequence of Tensor
            Cotangents of the output, of shape (pairs, outputs).
        """
        by_output: Multipliers = []
        for grad in grads:
            phi = torch.einsum("pfk,pk->pf", self.values, grad.detach().cpu().double())
            by_output.append(
                [
                    (spread_features(phi, number).to(share.device) * share).to(r.dtype)
                    for share, r, number in zip(
                        self.shares, self.references, self.numbers, strict=False
                    )
                ]
            )
        return by_output


def describe_rows(rows: float) -> str:
    """Return a number of rows in words.

    Examples
    --------
    >>> describe_rows(131072.0), describe_rows(2.0**60)
    ('131,072 rows', 'about 1e+18 rows')
    """
    if math.isinf(rows):
        return "more than 1e+308 rows"
    return f"{rows:,.0f} rows" if rows < 1e15 else f"about {rows:.0e} rows"


def describe_seconds(seconds: float) -> str:
    """Return a time in words.

    Examples
    --------
    >>> describe_seconds(5400)
    'about 1.5 hours'
    """
    if seconds > 1e6 * 31_557_600:
        return "more than a million years"
    units = (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("minutes", 60))
    unit, size = next((unit for unit in units if seconds >= unit[1]), ("seconds", 1))
    count = seconds / size
    return f"about {count:,.0f} {unit}" if count >= 10 else f"about {count:.1f} {unit}"
