"""The reference tape: the references' autograd graph, recorded once and used for every sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxshap.autograd.rescale import Endpoints
from fxshap.rules.core.caching import caching_between
from fxshap.rules.core.tracing import tracing_rules

#: What every nonlinear operation receives at one endpoint, by the name of the tapped node.
Taps = dict[str, Tensor]
#: For every cotangent, the multipliers of each input.
Multipliers = list[list[Tensor]]
#: ``backward(reference, sample, grads)`` returns the multipliers between two endpoints.
EndpointBackward = Callable[[Taps, Taps, Sequence[Tensor]], Multipliers]
#: Records a graph that reads the endpoints given to it.
Record = Callable[[Endpoints], EndpointBackward]


class Tape:
    """The rescaled graph, recorded on the references.

    The values on the tape are those of the references. The multipliers depend on both endpoints,
    which the rules read at backward time. The same tape therefore serves every sample and output.

    Parameters
    ----------
    rescaled_graph : callable
        ``rescaled_graph(endpoints, *inputs) -> output``.
    references : sequence of Tensor
        One tensor per input, of shape (references, ...).
    explained : int
        How many of the inputs, the first ones, have multipliers.
    max_batched : int
        The largest number of cotangents in one batched backward pass.
    record : callable, optional
        Returns compiled backward passes; by default the graph is recorded by autograd.

    Attributes
    ----------
    output : Tensor
        The model's output for the references.
    references : dict of str to Tensor
        The taps of the references.
    """

    def __init__(
        self,
        rescaled_graph: Callable[..., Tensor],
        references: Sequence[Tensor],
        explained: int,
        max_batched: int = 1,
        record: Record | None = None,
    ) -> None:
        self.max_batched = max_batched
        first = Recording(rescaled_graph, references, explained, Endpoints())
        self.output = first.output
        self.endpoints, self.references = first.endpoints, first.endpoints.reference
        self.recorded: dict[int, EndpointBackward] = {}
        if record is None:
            self.recorded[1] = first.backward
            self.record: Record = lambda endpoints: (
                Recording(rescaled_graph, references, explained, endpoints).backward
            )
        else:
            self.record = record
            # A backward pass from the references to themselves caches what rules compute of one
            # endpoint, which compiled backward passes take as arguments.
            with tracing_rules():
                first.backward(self.references, self.references, [torch.ones_like(self.output)])

    def backward_many(self, reference: Taps, sample: Taps, grads: Sequence[Tensor]) -> Multipliers:
        """Return for every cotangent the multipliers of every row between two endpoints.

        Parameters
        ----------
        reference, sample : dict of str to Tensor
            The taps of the endpoints: of as many rows as the tape has, or of one row.
        grads : sequence of Tensor
            Cotangents of the output, of shape (references, outputs).
        """
        groups = even_groups(grads, self.max_batched)
        several = caching_between(sample.values()) if len(groups) > 1 else nullcontext()
        with several:
            return [
                multipliers
                for group in groups
                for multipliers in self.backward_of(len(group))(reference, sample, group)
            ]

    def backward_of(self, copies: int) -> EndpointBackward:
        """Return the backward pass that takes this many cotangents at once."""
        if copies not in self.recorded:
            self.recorded[copies] = self.record(self.endpoints.for_copies(copies))
        return self.recorded[copies]


class Recording:
    """The autograd graph of the rescaled graph on copies of the references, one per cotangent.

    Several outputs share one batched backward pass, which is much faster where per-operation
    overhead dominates. The values of the copies are not stored: the rules read the references.
    """

    def __init__(
        self,
        rescaled_graph: Callable[..., Tensor],
        references: Sequence[Tensor],
        explained: int,
        endpoints: Endpoints,
    ) -> None:
        self.endpoints = endpoints
        inputs = [torch.cat([x.detach()] * endpoints.copies) for x in references]
        self.leaves = [leaf.requires_grad_() for leaf in inputs[:explained]]
        with torch.enable_grad():
            self.output: Tensor = rescaled_graph(endpoints, *inputs)

    def backward(self, reference: Taps, sample: Taps, grads: Sequence[Tensor]) -> Multipliers:
        """Return the multipliers between two endpoints, for one cotangent per copy."""
        endpoints = self.endpoints
        endpoints.check_jumps(reference, sample)
        own, endpoints.reference, endpoints.sample = endpoints.reference, reference, sample
        try:
            batched = self.input_cotangents(torch.cat(list(grads)))
        finally:
            endpoints.reference, endpoints.sample = own, {}
        return split_by_cotangent(batched, endpoints.copies)

    def input_cotangents(self, grad: Tensor) -> Sequence[Tensor]:
        """Return the cotangents of the inputs for that of the output."""
        if not self.output.requires_grad:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        # On this thread: rules read context variables, and autograd's thread of the device may be
        # waiting for the explanation lock.
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(
                self.output, self.leaves, grad, retain_graph=True, materialize_grads=True
            )


def split_by_cotangent(batched: Sequence[Tensor], copies: int) -> Multipliers:
    """Split the multipliers of every input by the copies that each cotangent had."""
    return [list(inputs) for inputs in zip(*(x.chunk(copies) for x in batched), strict=True)]


def even_groups(grads: Sequence[Tensor], largest: int) -> list[Sequence[Tensor]]:
    """Split cotangents into the fewest groups of at most `largest`, of about equal size."""
    size = math.ceil(len(grads) / math.ceil(len(grads) / largest))
    return [grads[start : start + size] for start in range(0, len(grads), size)]


#: Returns the multipliers of each input for a cotangent of the output.
BackwardFn = Callable[[Tensor], list[Tensor]]


class _WithMultipliers(torch.autograd.Function):
    """Return a known output for rows of samples and references, with multipliers as gradients."""

    @staticmethod
    def forward(ctx: Any, backward: BackwardFn, output: Tensor, *inputs: Tensor) -> Tensor:
        ctx.multipliers = backward
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Give both rows of a pair the multipliers of the pair, each for its own cotangent."""
        halves = grad.chunk(2)
        # Libraries that differentiate the sum over all rows pass the same cotangent twice.
        same = torch.equal(*halves)
        each = [ctx.multipliers(halves[0])] * 2 if same else list(map(ctx.multipliers, halves))
        return (None, None, *[torch.cat(pair) for pair in zip(*each, strict=True)])


def with_multipliers(backward: BackwardFn, output: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return `output` as a function of `inputs` whose derivative is `backward`."""
    apply: Callable[..., Tensor] = _WithMultipliers.apply
    return apply(backward, output, *inputs)
