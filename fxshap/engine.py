"""One capture of a model, the tape of its latest references, and the walks over it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.answers import Answer, Answers, Walk
from fxshap.capture import Captured, capture, tensor_at
from fxshap.inputs import require_finite
from fxshap.layout import Layout, probe_layout
from fxshap.output import Selector
from fxshap.refine import Found, Refinement, refined_multipliers
from fxshap.rewrite import Rewritten, rewrite
from fxshap.tape import Tape, Taps


class Engine:
    """One capture of the model and the tape of its latest references.

    Parameters
    ----------
    model : nn.Module
    inputs : sequence of Tensor
        Inputs to capture the model with.
    output : str, int, callable or None
        Which output to explain.
    refinement : Refinement
        How many coalitions to walk through.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Tensor],
        output: Selector,
        refinement: Refinement,
    ) -> None:
        self.model = model
        self.refinement = refinement
        self.captured: Captured = capture(model, inputs, output)
        self.rewritten: Rewritten = rewrite(self.captured)
        self.layout: Layout | None = None
        self.tape: Tape | None = None
        self.answers = Answers()
        self.answers_key: tuple[Hashable, Tape | None] = (None, None)
        self.tape_key: tuple[Any, ...] = ()
        self.version: tuple[Any, ...] = ()
        self.asked: Hashable = None
        self.sums: tuple[complex, ...] = ()

    def explain(
        self, samples: Sequence[Tensor], references: Sequence[Tensor], asked: Hashable
    ) -> tuple[Walk, Tensor]:
        """Return the walk that gives multipliers, and the outputs of both ends.

        Parameters
        ----------
        samples, references : sequence of Tensor
            One tensor an input, with as many rows each.
        asked : hashable
            Tells one explanation, of many calls, from the next.
        """
        version = self.bind_weights(asked)
        tape = self.tape_of(references, version)
        alone = all(bool((x == x[:1]).all()) for x in samples)
        if alone:
            samples = [x[:1] for x in samples]
        require_finite("sample", samples)
        layout = self.layout_of(samples, references)

        @cache
        def observed() -> tuple[Tensor, Taps]:
            return self.observe_sample(samples, layout, len(references[0]))

        def walks(grads: Sequence[Tensor]) -> list[list[Tensor]]:
            return self.walks(tape, samples, references, observed()[1], grads)

        answers = self.answers_of(asked, tape)
        answer = answers.of(samples) if alone else Answer()
        if answer.output is None:
            answer.output = observed()[0]
        output = torch.cat([answer.output.expand(len(references[0]), -1), tape.output.detach()])
        return partial(answers.walk, answer, walks, tape.size), output

    def walks(
        self,
        tape: Tape,
        samples: Sequence[Tensor],
        references: Sequence[Tensor],
        sample: Taps,
        grads: Sequence[Tensor],
    ) -> list[list[Tensor]]:
        """Return for every cotangent the multipliers from the references to the samples."""
        if not self.refinement.pairs:
            return tape.walks(tape.references, sample, grads)

        def through(hybrid: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Found, Found]:
            _, middle = self.observe(hybrid)
            return tape.walks(tape.references, middle, grads), tape.walks(middle, sample, grads)

        coalitions = self.refinement.draw(samples, references)
        return refined_multipliers(through, samples, references, coalitions, grads)

    def observe_sample(
        self, samples: Sequence[Tensor], layout: Layout, rows: int
    ) -> tuple[Tensor, Taps]:
        """Run samples, one row or as many as the references; their taps broadcast against those."""
        if layout.tile:
            return self.observe([x.expand(rows, *x.shape[1:]) for x in samples])
        output, taps = self.observe(samples)
        if len(samples[0]) < rows:
            taps = dict(zip(taps, layout.spread(list(taps.values()), rows), strict=True))
        return output, taps

    def answers_of(self, asked: Hashable, tape: Tape) -> Answers:
        """Return what was found ahead in this explanation with these references."""
        if self.answers_key != (asked, tape):
            self.answers_key, self.answers = (asked, tape), Answers()
        return self.answers

    @torch.no_grad()
    def observe(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Taps]:
        """Run the captured graph; return the output and the taps by name."""
        output, taps = self.rewritten.observe(*inputs)
        return output, dict(zip(self.rewritten.taps, taps, strict=True))

    def layout_of(self, samples: Sequence[Tensor], references: Sequence[Tensor]) -> Layout:
        """Return where the batch lies in every tap, found out at the first explanation."""
        if self.layout is None:
            pairs = [torch.cat([r[:1], x[:1]]) for r, x in zip(references, samples, strict=True)]
            self.layout = probe_layout(self.rewritten.observe, pairs, self.captured.rows)
        return self.layout

    def tape_of(self, references: Sequence[Tensor], version: tuple[Any, ...]) -> Tape:
        """Return the tape of these references, recorded again when anything has changed."""
        same = (
            self.tape is not None
            and self.tape_key == version
            and all(
                old.shape == new.shape and torch.equal(old, new)
                for old, new in zip(self.tape.leaves, references, strict=True)
            )
        )
        if not same or self.tape is None:
            require_finite("references", references)
            self.tape = None  # let go of the old one first
            self.tape = Tape(self.rewritten.attribute, references)
            self.tape_key = version
        return self.tape

    def bind_weights(self, asked: Hashable) -> tuple[Any, ...]:
        """Point the graphs at the model's present weights; return what tells if they change."""
        weights = [tensor_at(self.model, path) for path in self.captured.weights.values()]
        if asked != self.asked:  # once an explanation: edits of `.data` leave the version alone
            self.asked, self.sums = asked, sums_of(weights)
        version = (*((weight.data_ptr(), weight._version) for weight in weights), self.sums)
        if version != self.version:
            self.version = version
            self.rewritten.bind(dict(zip(self.captured.weights, weights, strict=True)))
        return version


def sums_of(weights: Sequence[Tensor]) -> tuple[complex, ...]:
    """Return the sum of every tensor."""
    single = torch.float32
    return tuple(
        weight.detach().sum(dtype=torch.promote_types(weight.dtype, single)).item()
        for weight in weights
    )
