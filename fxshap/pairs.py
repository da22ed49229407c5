"""Samples paired with references: what one question of SHAP is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxshap.layout import Layout
from fxshap.references import References
from fxshap.refine import Found, Refinement, refined_multipliers
from fxshap.tape import Tape, Taps

Observe = Callable[[Sequence[Tensor]], tuple[Tensor, Taps]]


class Pairs:
    """Every reference with its sample, or with the only one.

    Parameters
    ----------
    observe : callable
        Returns the output and the taps of inputs.
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
        layout: Layout,
        refinement: Refinement,
        samples: Sequence[Tensor],
        references: References,
    ) -> None:
        self.observe = observe
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

    def walks(self, grads: Sequence[Tensor]) -> Found:
        """Return for every cotangent the multipliers from the references to the samples."""
        explained = self.references.explained
        coalitions = self.refinement.draw(
            self.samples[:explained], self.references.inputs[:explained]
        )
        found = [
            self._walk(
                self.references.tape(part),
                part,
                [[mask[part] for mask in masks] for masks in coalitions],
                [grad[part] for grad in grads],
            )
            for part in self.references.parts()
        ]
        if len(found) == 1:
            return found[0]
        return [
            [torch.cat(parts) for parts in zip(*inputs, strict=True)]
            for inputs in zip(*found, strict=True)
        ]

    def _walk(
        self,
        tape: Tape,
        part: slice,
        coalitions: Sequence[Sequence[Tensor]],
        grads: Sequence[Tensor],
    ) -> Found:
        _, sample = self.end(part)
        if not coalitions:
            return tape.walks(tape.references, sample, grads)

        explained = self.references.explained
        samples = [x if self.single else x[part] for x in self.samples[:explained]]
        references = [x[part] for x in self.references.inputs]
        references, beside = references[:explained], references[explained:]

        def through(hybrid: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Found, Found]:
            _, middle = self.observe([*hybrid, *beside])
            return tape.walks(tape.references, middle, grads), tape.walks(middle, sample, grads)

        return refined_multipliers(through, samples, references, coalitions, grads)
