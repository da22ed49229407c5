"""The reference tape: the references' autograd graph, recorded once and walked for every sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from fxshap.rescale import Ends
from fxshap.rules.operation import keeping_slopes

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
    """

    def __init__(
        self, attribute: fx.GraphModule, references: Sequence[Tensor], explained: int
    ) -> None:
        self.ends = Ends()
        self.inputs = [reference.detach().clone() for reference in references]
        self.leaves = [leaf.requires_grad_() for leaf in self.inputs[:explained]]
        with torch.enable_grad():
            self.output: Tensor = attribute(self.ends, *self.inputs)
        self.references = self.ends.reference

    def walks(self, reference: Taps, sample: Taps, grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return for every cotangent the multipliers of every row from one end to the other.

        Parameters
        ----------
        reference, sample : dict of str to Tensor
            The taps of the two ends: of as many rows as the tape has, or of one row.
        grads : sequence of Tensor
            Cotangents of the output, of shape (references, outputs).
        """
        self.ends.reference, self.ends.sample = reference, sample
        several = keeping_slopes(sample.values()) if len(grads) > 1 else nullcontext()
        try:
            self.ends.refuse_jumps()
            with several:
                return [self.backward(grad) for grad in grads]
        finally:
            self.ends.reference, self.ends.sample = self.references, {}

    def backward(self, grad: Tensor) -> list[Tensor]:
        """Walk back through the recorded graph, between the ends that are set."""
        if not self.output.requires_grad:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        found = torch.autograd.grad(
            self.output, self.leaves, grad, retain_graph=True, materialize_grads=True
        )
        return list(found)


Walk = Callable[[Tensor], list[Tensor]]


class _Explained(torch.autograd.Function):
    """Return a known output for rows of samples and references, with a walk for a derivative."""

    @staticmethod
    def forward(ctx: Any, walk: Walk, output: Tensor, *inputs: Tensor) -> Tensor:
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


def explained(walk: Walk, output: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return `output` as a function of `inputs` whose derivative is `walk`."""
    apply: Callable[..., Tensor] = _Explained.apply
    return apply(walk, output, *inputs)
