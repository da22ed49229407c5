"""The reference tape: the references' autograd graph, recorded once and used for every sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fxshap.autograd.rescale import Endpoints
from fxshap.rules.core.caching import caching_between
from fxshap.rules.core.tracing import tracing_rules

T = TypeVar("T")
#: What every nonlinear operation receives at one endpoint, by the name of the tapped node.
Taps = dict[str, Tensor]
#: For every cotangent, the multipliers of each input.
Multipliers = list[list[Tensor]]
#: ``backward(reference, sample, grads)`` returns the multipliers between two endpoints.
EndpointBackward = Callable[[Taps, Taps, Sequence[Tensor]], Multipliers]
#: Records a graph that reads the endpoints given to it.
Record = Callable[[Endpoints], EndpointBackward]
#: One tensor per explained input, of the input's shape.
Tangents = Sequence[Tensor]


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
        self.recordings = {1: first} if record is None else {}
        self.compiled: dict[int, EndpointBackward] = {}
        self.record = record
        self.record_copies = partial(Recording, rescaled_graph, references, explained)
        if record is not None:
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
        if self.record is None:
            return self.recording_of(copies).backward
        if copies not in self.compiled:
            self.compiled[copies] = self.record(self.endpoints.for_copies(copies))
        return self.compiled[copies]

    def jvp_many(self, reference: Taps, sample: Taps, tangents: Sequence[Tangents]) -> list[Tensor]:
        """Return for every tangent of the inputs the products of the multipliers with it.

        Where outputs outnumber inputs, one product per input costs less than one backward pass per
        output.

        Parameters
        ----------
        reference, sample : dict of str to Tensor
            The taps of the endpoints: of as many rows as the tape has, or of one row.
        tangents : sequence of sequence of Tensor
            For each tangent one tensor per explained input, of shape (references, ...).

        Returns
        -------
        list of Tensor
            For each tangent the change of every output, of shape (references, outputs).
        """
        with caching_between(sample.values()):
            return [
                change
                for group in even_groups(tangents, self.max_batched)
                for change in self.recording_of(len(group)).jvp(reference, sample, group)
            ]

    def recording_of(self, copies: int) -> Recording:
        """Return the recording on this many copies of the references."""
        if copies not in self.recordings:
            self.recordings[copies] = self.record_copies(self.endpoints.for_copies(copies))
        return self.recordings[copies]


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
        with self._between(reference, sample):
            batched = self.input_cotangents(torch.cat(list(grads)))
        return split_by_cotangent(batched, self.endpoints.copies)

    def jvp(self, reference: Taps, sample: Taps, tangents: Sequence[Tangents]) -> list[Tensor]:
        """Return the change of the output for one tangent of the inputs per copy.

        The backward pass is a linear function of the cotangent. Its own derivative, in the
        direction of the tangents, is its transpose applied to them.
        """
        with self._between(reference, sample), torch.enable_grad():
            grad = torch.zeros_like(self.output, requires_grad=True)
            cotangents = self.input_cotangents(grad, differentiable=True)
            pairs = zip(cotangents, zip(*tangents, strict=True), strict=True)
            chosen = [(c, torch.cat(parts)) for c, parts in pairs if c.requires_grad]
            if not chosen:
                return list(torch.zeros_like(self.output).chunk(len(tangents)))
            inputs, directions = zip(*chosen, strict=True)
            (change,) = torch.autograd.grad(inputs, grad, directions, materialize_grads=True)
        return list(change.chunk(len(tangents)))

    @contextmanager
    def _between(self, reference: Taps, sample: Taps) -> Iterator[None]:
        """Give the rules these endpoints.

        Backward passes stay on this thread: rules read context variables, and autograd's thread of
        the device may be waiting for the explanation lock.
        """
        endpoints = self.endpoints
        endpoints.check_jumps(reference, sample)
        own, endpoints.reference, endpoints.sample = endpoints.reference, reference, sample
        try:
            with torch.autograd.set_multithreading_enabled(False):
                yield
        finally:
            endpoints.reference, endpoints.sample = own, {}

    def input_cotangents(self, grad: Tensor, differentiable: bool = False) -> Sequence[Tensor]:
        """Return the cotangents of the inputs for that of the output."""
        if not self.output.requires_grad:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        return torch.autograd.grad(
            self.output,
            self.leaves,
            grad,
            retain_graph=True,
            create_graph=differentiable,
            materialize_grads=True,
        )


def split_by_cotangent(batched: Sequence[Tensor], copies: int) -> Multipliers:
    """Split the multipliers of every input by the copies that each cotangent had."""
    return [list(inputs) for inputs in zip(*(x.chunk(copies) for x in batched), strict=True)]


def even_groups(items: Sequence[T], largest: int) -> list[Sequence[T]]:
    """Split cotangents or tangents into the fewest groups of at most `largest`, about equal."""
    size = math.ceil(len(items) / math.ceil(len(items) / largest))
    return [items[start : start + size] for start in range(0, len(items), size)]


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
        return (None, None, *ctx.multipliers(grad))


def with_multipliers(backward: BackwardFn, output: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return `output` as a function of `inputs` whose derivative is `backward`."""
    apply: Callable[..., Tensor] = _WithMultipliers.apply
    return apply(backward, output, *inputs)
