"""Samples paired with references: what one question of SHAP is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxshap.autograd.tape import Tape, Taps
from fxshap.runtime.batching import BatchLayout
from fxshap.runtime.coalitions import (
    CoalitionChains,
    CoalitionPasses,
    Multipliers,
    Refinement,
    refined_multipliers,
)
from fxshap.runtime.progress import Step, progress_line
from fxshap.runtime.references import References

Observe = Callable[[Sequence[Tensor]], tuple[Tensor, Taps]]
Complete = Callable[[Taps, Taps, Sequence[Tensor]], tuple[Taps, Taps]]


class SampleReferencePairs:
    """Every reference with its sample, or with the only one.

    Parameters
    ----------
    observe : callable
        Returns the output and the taps of inputs.
    complete : callable
        Returns the taps of two ends with the variances between them.
    layout : Layout
        Where the batch lies in the taps.
    refinement : Refinement
        How many coalitions to walk through.
    samples : sequence of Tensor
        One tensor an input, of as many rows as there are references, or of one row.
    references : References
    """

    def __init__(
        self,
        observe: Observe,
        complete: Complete,
        layout: BatchLayout,
        refinement: Refinement,
        samples: Sequence[Tensor],
        references: References,
    ) -> None:
        self.observe = observe
        self.complete = complete
        self.layout = layout
        self.refinement = refinement
        self.samples = samples
        self.references = references
        self.single = len(samples[0]) == 1
        self._seen: dict[tuple[int, int], tuple[Tensor, Taps]] = {}

    def output(self) -> Tensor:
        """Return the model's output for every reference's sample."""
        count = len(self.references.inputs[0])
        if self.single:
            return self.end(slice(0, min(count, self.references.rows)))[0][:1]
        return torch.cat([self.end(part)[0] for part in self.references.parts()])

    def end(self, part: slice) -> tuple[Tensor, Taps]:
        """Return the output and the taps of the samples of a part of the references."""
        rows = part.stop - part.start
        key = (0, rows) if self.single else (part.start, rows)
        if key not in self._seen:
            self._seen = {
                key: self._run([x if self.single else x[part] for x in self.samples], rows)
            }
        return self._seen[key]

    def _run(self, samples: Sequence[Tensor], rows: int) -> tuple[Tensor, Taps]:
        if self.layout.tile:
            return self.observe([x.expand(rows, *x.shape[1:]) for x in samples])
        output, taps = self.observe(samples)
        if len(samples[0]) < rows:
            taps = dict(zip(taps, self.layout.spread(list(taps.values()), rows), strict=True))
        return output, taps

    def walk(self, grad: Tensor) -> list[Tensor]:
        """Return the multipliers from the references to the samples for one cotangent."""
        return self.walks([grad])[0]

    def walks(self, grads: Sequence[Tensor]) -> Multipliers:
        """Return for every cotangent the multipliers from the references to the samples."""
        explained, parts = self.references.explained, self.references.parts()
        chains = self.refinement.draw(self.samples[:explained], self.references.inputs[:explained])
        show = self.refinement.progress and bool(chains.drawn)
        with progress_line("fxshap refines", show, chains.walks * len(parts)) as step:
            found = [
                self._walk(
                    self.references.tape(part),
                    part,
                    chains.of(part),
                    [grad[part] for grad in grads],
                    step,
                )
                for part in parts
            ]
        if len(found) == 1:
            return found[0]
        return [
            [torch.cat(parts) for parts in zip(*inputs, strict=True)]
            for inputs in zip(*found, strict=True)
        ]

    def _walk(
        self, tape: Tape, part: slice, chains: CoalitionChains, grads: Sequence[Tensor], step: Step
    ) -> Multipliers:
        explained = self.references.explained
        references = [x[part] for x in self.references.inputs]

        def walks(start: Taps, end: Taps) -> Multipliers:
            step()
            return tape.walks(*self.complete(start, end, references), grads)

        walker = CoalitionPasses(
            lambda points: self._observe([[*point, *references[explained:]] for point in points]),
            walks,
            [x if self.single else x[part] for x in self.samples[:explained]],
            references[:explained],
            self.end(part)[1],
            tape.references,
        )
        return refined_multipliers(walker, chains)

    def _observe(self, points: Sequence[Sequence[Tensor]]) -> list[Taps]:
        """Return the taps of several points, as one batch where its rows come apart again."""
        if self.layout.tile:
            return [self.observe(point)[1] for point in points]
        _, taps = self.observe([torch.cat(rows) for rows in zip(*points, strict=True)])
        pieces = self.layout.apart(list(taps.values()), len(points))
        return [dict(zip(taps, piece, strict=True)) for piece in pieces]
