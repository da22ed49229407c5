"""Samples paired with references: what one call of SHAP explains."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fxshap.autograd.tape import Multipliers, Tangents, Tape, Taps
from fxshap.runtime.batching import BatchLayout, repeat_samples
from fxshap.runtime.coalitions import (
    CoalitionChains,
    CoalitionPasses,
    draw_chains,
    refined_multipliers,
)
from fxshap.runtime.exact import ExactGame
from fxshap.runtime.options import Options
from fxshap.runtime.program import Program
from fxshap.runtime.progress import Step, progress_bar
from fxshap.runtime.references import References


class SampleReferencePairs:
    """Every reference with its sample.

    Parameters
    ----------
    program : Program
    layout : BatchLayout
        The batch dimension of every tap.
    options : Options
    samples : sequence of Tensor
        One tensor per input: with as many rows as there are references, with one row for all of
        them, or with one row for each of several blocks of references of equal size.
    references : References
    averaged : bool
        Whether the attributions will be averaged over the references of each sample.
    game : ExactGame, optional
        Gives the exact Shapley values in place of backward passes.
    """

    def __init__(
        self,
        program: Program,
        layout: BatchLayout,
        options: Options,
        samples: Sequence[Tensor],
        references: References,
        averaged: bool = False,
        game: ExactGame | None = None,
    ) -> None:
        self.program = program
        self.layout = layout
        self.options = options
        self.samples = samples
        self.references = references
        self.averaged = averaged
        self.game = game
        self.single = len(samples[0]) == 1
        self._seen: dict[tuple[int, int], tuple[Tensor, Taps]] = {}

    @property
    def count(self) -> int:
        """How many pairs there are."""
        return len(self.references.inputs[0])

    def output(self) -> Tensor:
        """Return the model's output for every reference's sample."""
        if self.single:
            return self.sample_endpoint(slice(0, min(self.count, self.references.rows)))[0][:1]
        return torch.cat([self.sample_endpoint(part)[0] for part in self.references.parts()])

    def sample_endpoint(self, part: slice) -> tuple[Tensor, Taps]:
        """Return the output and the taps of the samples of a part of the references."""
        rows = part.stop - part.start
        key = (0, rows) if self.single else (part.start, rows)
        if key not in self._seen:
            self._seen = {
                key: self._run([x if self.single else x[part] for x in self.samples], rows)
            }
        return self._seen[key]

    def _run(self, samples: Sequence[Tensor], rows: int) -> tuple[Tensor, Taps]:
        count = len(samples[0])
        if self.layout.tile and count == 1:
            return self.program.tapped([x.expand(rows, *x.shape[1:]) for x in samples])
        if self.layout.tile:
            return self.program.tapped(
                [repeat_samples(x, 0, count, rows // count) for x in samples]
            )
        output, taps = self.program.tapped(samples)
        if count < rows:
            expanded = self.layout.expand_rows(list(taps.values()), count, rows)
            taps = dict(zip(taps, expanded, strict=True))
        return output, taps

    def backward(self, grad: Tensor) -> list[Tensor]:
        """Return the multipliers from the references to the samples for one cotangent."""
        return self.backward_many([grad])[0]

    def backward_many(self, grads: Sequence[Tensor]) -> Multipliers:
        """Return for every cotangent the multipliers from the references to the samples."""
        if self.game is not None:
            return self.game.backward_many(grads)
        return self.program.deferral(partial(self._backward_many, grads))

    def _backward_many(self, grads: Sequence[Tensor]) -> Multipliers:
        if self.program.rows in (None, 1) or (self.single and self.averaged):
            return self._backward_together(grads)
        by_row = [self._only_row(row)._backward_together(grads) for row in range(self.count)]
        return [
            [
                torch.cat([m[row : row + 1] for row, m in enumerate(rows)])
                for rows in zip(*inputs, strict=True)
            ]
            for inputs in zip(*by_row, strict=True)
        ]

    def _only_row(self, row: int) -> SampleReferencePairs:
        """Return the pairs in which all rows but one stay at their references.

        A graph for a fixed number of rows does not tell which elements belong to which row. Some
        rules then restore the change of all rows together, so only one row may change.
        """
        samples = [r.clone() for r in self.references.inputs]
        for moved, x in zip(samples, self.samples, strict=True):
            moved[row] = x[0 if self.single else row]
        return SampleReferencePairs(
            self.program, self.layout, self.options, samples, self.references
        )

    def _backward_together(self, grads: Sequence[Tensor]) -> Multipliers:
        explained, parts = self.references.explained, self.references.parts()
        chains = draw_chains(
            self.options.refinement, self.samples[:explained], self.references.inputs[:explained]
        )
        show = self.options.progress and bool(chains.drawn)
        steps = chains.backward_passes * len(parts)
        with progress_bar("fxshap refines", show, steps) as step:
            by_part = [
                self._backward_on_tape(
                    self.references.tape(part),
                    part,
                    chains.of(part),
                    [grad[part] for grad in grads],
                    step,
                )
                for part in parts
            ]
        if len(by_part) == 1:
            return by_part[0]
        return [
            [torch.cat(rows) for rows in zip(*inputs, strict=True)]
            for inputs in zip(*by_part, strict=True)
        ]

    def jvp_many(self, tangents: Sequence[Tangents]) -> list[Tensor]:
        """Return for every tangent of the inputs the products of the multipliers with it.

        Parameters
        ----------
        tangents : sequence of sequence of Tensor
            For each tangent one tensor per explained input, of shape (references, ...).

        Returns
        -------
        list of Tensor
            For each tangent the change of every output, of shape (references, outputs).
        """
        references, by_part = self.references, []
        for part in references.parts():
            tape = references.tape(part)
            start, end = self.program.with_variances(
                tape.references, self.sample_endpoint(part)[1], [x[part] for x in references.inputs]
            )
            chosen = [[x[part] for x in tangent] for tangent in tangents]
            by_part.append(tape.jvp_many(start, end, chosen))
        return [torch.cat(rows) for rows in zip(*by_part, strict=True)]

    def _backward_on_tape(
        self,
        tape: Tape,
        part: slice,
        chains: CoalitionChains,
        grads: Sequence[Tensor],
        step: Step,
    ) -> Multipliers:
        explained = self.references.explained
        references = [x[part] for x in self.references.inputs]

        def backward(start: Taps, end: Taps) -> Multipliers:
            step()
            endpoints = self.program.with_variances(start, end, references)
            return tape.backward_many(*endpoints, grads)

        def tapped(points: Sequence[Sequence[Tensor]]) -> list[Taps]:
            return self._tapped_batches([[*point, *references[explained:]] for point in points])

        passes = CoalitionPasses(
            tapped,
            backward,
            [x if self.single else x[part] for x in self.samples[:explained]],
            references[:explained],
            self.sample_endpoint(part)[1],
            tape.references,
        )
        return refined_multipliers(passes, chains)

    def _tapped_batches(self, points: Sequence[Sequence[Tensor]]) -> list[Taps]:
        """Return the taps of several points, run as one batch if its rows can be split again."""
        if self.layout.tile:
            return [self.program.tapped(point)[1] for point in points]
        _, taps = self.program.tapped([torch.cat(rows) for rows in zip(*points, strict=True)])
        batches = self.layout.split_batches(list(taps.values()), len(points))
        return [dict(zip(taps, batch, strict=True)) for batch in batches]
