"""One capture of a model, the tape of its latest references, and the walks over it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.capture import Captured, tensor_at
from fxshap.inputs import require_finite
from fxshap.layers import Trunk
from fxshap.layout import Layout, probe_layout
from fxshap.refine import Refinement, refined_multipliers
from fxshap.rewrite import Rewritten, rewrite
from fxshap.tape import Tape, Walk

Taps = dict[str, Tensor]


class Engine:
    """One capture of the model and the tape of its latest references.

    Parameters
    ----------
    model : nn.Module
    captured : Captured
        The model's graph, or the head of it.
    refinement : Refinement
        How many coalitions to walk through.
    trunk : Trunk, optional
        What leads to the head.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        refinement: Refinement,
        trunk: Trunk | None = None,
    ) -> None:
        self.model = model
        self.captured = captured
        self.refinement = refinement
        self.trunk = trunk
        self.rewritten: Rewritten = rewrite(self.captured)
        self.layout: Layout | None = None
        self.tape: Tape | None = None
        self.tape_key: tuple[Any, ...] = ()
        self.version: tuple[Any, ...] = ()
        self.asked: Hashable = None
        self.sums: tuple[complex, ...] = ()

    def enter(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return what the graph takes for inputs of the model."""
        return list(inputs) if self.trunk is None else self.trunk(self.model, inputs)

    def explain(
        self, samples: Sequence[Tensor], references: Sequence[Tensor], asked: Hashable
    ) -> tuple[Walk, Tensor]:
        """Return the walk that gives multipliers, and the outputs of both ends.

        Parameters
        ----------
        samples, references : sequence of Tensor
            One tensor an input of the graph, with as many rows each.
        asked : hashable
            Tells one explanation, of many calls, from the next.
        """
        version = self.bind_weights(asked)
        tape = self.tape_of(references, version)
        rows = len(references[0])
        alone = all(bool((x == x[:1]).all()) for x in samples)
        if alone:
            samples = [x[:1] for x in samples]
        require_finite("sample", samples[: self.captured.explained])
        layout = self.layout_of(samples, references)
        tiled = [x.expand(rows, *x.shape[1:]) for x in samples] if layout.tile else samples
        y_sample, sample = self.observe(tiled)
        if alone and not layout.tile:
            sample = dict(zip(sample, layout.spread(list(sample.values()), rows), strict=True))
        output = torch.cat([y_sample.expand(rows, *y_sample.shape[1:]), tape.output.detach()])
        if not self.refinement.pairs:
            return partial(tape.walk, tape.references, sample), output

        explained = self.captured.explained
        beside = references[explained:]

        def through(hybrid: Sequence[Tensor], grad: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            _, middle = self.observe([*hybrid, *beside])
            return tape.walk(tape.references, middle, grad), tape.walk(middle, sample, grad)

        ends = samples[:explained], references[:explained]
        coalitions = self.refinement.draw(*ends)
        return partial(refined_multipliers, through, *ends, coalitions), output

    @torch.no_grad()
    def observe(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Taps]:
        """Run the captured graph; return the output and the taps by name."""
        output, taps = self.rewritten.observe(*inputs)
        return output, dict(zip(self.rewritten.taps, taps, strict=True))

    def layout_of(self, samples: Sequence[Tensor], references: Sequence[Tensor]) -> Layout:
        """Return where the batch lies in every tap, found out at the first explanation."""
        if self.layout is None:
            pairs = [torch.cat([r[:1], x[:1]]) for r, x in zip(references, samples, strict=True)]
            self.layout = probe_layout(
                self.rewritten.observe, pairs, self.captured.rows, self.captured.explained
            )
        return self.layout

    def tape_of(self, references: Sequence[Tensor], version: tuple[Any, ...]) -> Tape:
        """Return the tape of these references, recorded again when anything has changed."""
        same = (
            self.tape is not None
            and self.tape_key == version
            and all(
                old.shape == new.shape and torch.equal(old, new)
                for old, new in zip(self.tape.inputs, references, strict=True)
            )
        )
        if not same or self.tape is None:
            require_finite("references", references[: self.captured.explained])
            self.tape = None  # let go of the old one first
            self.tape = Tape(self.rewritten.attribute, references, self.captured.explained)
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
