"""The reference tape: the references' autograd graph, recorded once and walked for every sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from fxshap.autograd.rescale import Endpoints
from fxshap.rules.core.caching import caching_slopes
from fxshap.rules.core.tracing import tracing_rules

Taps = dict[str, Tensor]


class Tape:
    """The recorded graph of `attribute` on the references.

    The values on it are the references'; the multipliers of a walk come from both ends, which the
    rules read at backward time. The same tape therefore serves every sample and every output.

    Parameters
    ----------
    attribute : fx.GraphModule
        ``attribute(ends, *inputs) -> output``.
    references : sequence of Tensor
        One tensor an input, of shape (references, ...).
    explained : int
        How many of the inputs, the first ones, have multipliers.
    abreast : int
        The most cotangents that are walked side by side.
    fused : Fused, optional
        Compiled walks to take.
    """

    def __init__(
        self,
        attribute: fx.GraphModule,
        references: Sequence[Tensor],
        explained: int,
        abreast: int = 1,
        fused: Fused | None = None,
    ) -> None:
        self.abreast = abreast
        first = Recording(attribute, references, explained, Endpoints())
        self.output = first.output
        self.ends, self.references = first.ends, first.ends.reference
        self.recordings: dict[int, Recorded] = {}
        if fused is None:
            self.record: Record = partial(Recording, attribute, references, explained)
            self.recordings[1] = first
        else:
            self.record = partial(fused.record, references)
            # From the references to themselves: what rules keep of one end is there after it.
            with tracing_rules(), torch.autograd.set_multithreading_enabled(False):
                first.walk(self.references, self.references, [torch.ones_like(self.output)])

    def walks(self, reference: Taps, sample: Taps, grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return for every cotangent the multipliers of every row from one end to the other.

        Parameters
        ----------
        reference, sample : dict of str to Tensor
            The taps of the two ends: of as many rows as the tape has, or of one row.
        grads : sequence of Tensor
            Cotangents of the output, of shape (references, outputs).
        """
        groups = even_groups(grads, self.abreast)
        several = caching_slopes(sample.values()) if len(groups) > 1 else nullcontext()
        with several:
            return [
                multipliers
                for group in groups
                for multipliers in self.recording(len(group)).walk(reference, sample, group)
            ]

    def recording(self, copies: int) -> Recorded:
        """Return what walks so many cotangents side by side."""
        if copies not in self.recordings:
            self.recordings[copies] = self.record(self.ends.copied(copies))
        return self.recordings[copies]


class Recorded(Protocol):
    """What walks between two ends, with as many cotangents as it was recorded for."""

    def walk(self, reference: Taps, sample: Taps, grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return for every cotangent the multipliers of each input."""
        ...


Record = Callable[[Endpoints], Recorded]


class Fused(Protocol):
    """Compiled walks; see :mod:`fxshap.autograd.compiled`."""

    def record(self, references: Sequence[Tensor], ends: Endpoints) -> Recorded:
        """Return what walks between these references and samples."""
        ...


class Recording:
    """The autograd graph of `attribute` on copies of the references, one for each cotangent.

    Several outputs walk side by side in one batch, which is much quicker where an operation costs
    more than its numbers. The copies are not kept: the rules read the values of the references.
    """

    def __init__(
        self,
        attribute: Callable[..., Tensor],
        references: Sequence[Tensor],
        explained: int,
        ends: Endpoints,
    ) -> None:
        self.ends = ends
        inputs = [torch.cat([x.detach()] * ends.copies) for x in references]
        self.leaves = [leaf.requires_grad_() for leaf in inputs[:explained]]
        with torch.enable_grad():
            self.output: Tensor = attribute(ends, *inputs)

    def walk(self, reference: Taps, sample: Taps, grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """Walk back through the recorded graph, with a cotangent for each copy."""
        ends, copies = self.ends, self.ends.copies
        ends.refuse_jumps(reference, sample)
        own, ends.reference, ends.sample = ends.reference, reference, sample
        try:
            found = self.backward(torch.cat(list(grads)))
        finally:
            ends.reference, ends.sample = own, {}
        return split_by_cotangent(found, copies)

    def backward(self, grad: Tensor) -> Sequence[Tensor]:
        """Return the cotangents of the inputs for that of the output."""
        if not self.output.requires_grad:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        return torch.autograd.grad(
            self.output, self.leaves, grad, retain_graph=True, materialize_grads=True
        )


def split_by_cotangent(found: Sequence[Tensor], copies: int) -> list[list[Tensor]]:
    """Take the multipliers of every input apart, by the copies that each cotangent had."""
    return [list(inputs) for inputs in zip(*(x.chunk(copies) for x in found), strict=True)]


def even_groups(grads: Sequence[Tensor], most: int) -> list[Sequence[Tensor]]:
    """Split cotangents into as few groups of at most `most` as there can be, about as large."""
    size = math.ceil(len(grads) / math.ceil(len(grads) / most))
    return [grads[start : start + size] for start in range(0, len(grads), size)]


BackwardFn = Callable[[Tensor], list[Tensor]]


class _WithMultipliers(torch.autograd.Function):
    """Return a known output for rows of samples and references, with a walk for a derivative."""

    @staticmethod
    def forward(ctx: Any, walk: BackwardFn, output: Tensor, *inputs: Tensor) -> Tensor:
        ctx.walk = walk
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Give both rows of a pair the pair's multipliers, each for its own cotangent."""
        ends = grad.chunk(2)
        alike = torch.equal(*ends)  # as whoever asks for the sum over all rows has it
        walks = [ctx.walk(ends[0])] * 2 if alike else [ctx.walk(end) for end in ends]
        return (None, None, *[torch.cat(pair) for pair in zip(*walks, strict=True)])


def with_multipliers(walk: BackwardFn, output: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return `output` as a function of `inputs` whose derivative is `walk`."""
    apply: Callable[..., Tensor] = _WithMultipliers.apply
    return apply(walk, output, *inputs)
