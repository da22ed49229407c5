"""Attributions of many samples and outputs, in batches of sample-reference pairs.

Every sample is paired with every reference. Small pairs are stacked: one backward pass takes the
pairs of several samples and the cotangents of several outputs. Large pairs are not: there one
sample with its references keeps the processor busy, and one tape of the references serves all
samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxshap.autograd.tape import Tangents
from fxshap.errors import RuleError
from fxshap.frontend.inputs import check_finite
from fxshap.frontend.outputs import check_finite_outputs, check_output_count
from fxshap.rules.core.blocks import smallest_blocks
from fxshap.rules.core.tracing import any_unless_tracing
from fxshap.runtime.batching import batched_bytes
from fxshap.runtime.engine import Engine
from fxshap.runtime.memory import LargestTensor
from fxshap.runtime.pairs import SampleReferencePairs
from fxshap.runtime.references import References, rows_that_fit

logger = logging.getLogger("fxshap")

#: The units of rounding by which products with tangents may differ from a backward pass.
ROUNDING = 100


@dataclass(frozen=True)
class Attributions:
    """The attributions of a batch of samples.

    Attributes
    ----------
    values : list of Tensor
        One tensor per explained input, of shape (samples, ..., outputs explained).
    output : Tensor
        The model's output for the samples, of shape (samples, outputs).
    expected : Tensor
        The mean of the model's output over the references, of shape (samples or 1, outputs): one
        row if the references are the same for all samples.
    """

    values: list[Tensor]
    output: Tensor
    expected: Tensor

    def from_sample(self, start: int) -> Attributions:
        """Return the attributions without those of the first `start` samples."""
        if not start:
            return self
        expected = self.expected[start:] if len(self.expected) > 1 else self.expected
        return Attributions([v[start:] for v in self.values], self.output[start:], expected)


class PairBatches:
    """Explains batches of samples with one capture of a model.

    Parameters
    ----------
    engine : Engine
    references : sequence of Tensor
        The explained inputs of the program for the background, one tensor per input.
    explanation : object
        Identifies the explanation.
    outputs : int
        How many outputs the model had when the explainer was created.
    """

    def __init__(
        self, engine: Engine, references: Sequence[Tensor], explanation: object, outputs: int
    ) -> None:
        self.engine = engine
        self.references = references
        self.count = len(references[0])
        self.explanation = explanation
        self.outputs = outputs
        self._shared: References | None = None  # those of the last batch, if all batches share them

    @property
    def one_at_a_time(self) -> bool:
        """Whether samples cannot be stacked.

        That is in a graph of fixed rows, between coalitions, and where a bound mask selects another
        number of elements for each sample.
        """
        program, refinement = self.engine.program, self.engine.options.refinement
        return (
            program.rows is not None
            or refinement.coalitions != 0
            or program.rewritten.has_ragged_taps
        )

    def batch_size(self, samples: Sequence[Tensor], columns: Tensor) -> int:
        """Return how many samples to stack in one batch, by the largest tensor of a pair.

        Parameters
        ----------
        samples : sequence of Tensor
            Inputs of the program, with one row or more.
        columns : Tensor
            The outputs to explain of each sample, of shape (samples, outputs explained).
        """
        engine, first = self.engine, [x[:1] for x in samples]
        if self.one_at_a_time or len(columns) == 1:
            return 1
        layout = engine.find_layout(first, self._inputs(first))
        device = samples[0].device
        passes = min(columns.shape[1], sum(r[0].numel() for r in self.references))
        most = batched_bytes(device) // max(self.count * passes, 1)  # of the pairs of one sample
        if 2 * layout.largest > most:
            return 1
        if engine.largest is None:
            engine.largest = max(layout.largest, self._largest_of_pair(first, columns[:1, :1]))
        size = most // max(engine.largest, 1)
        if isinstance(limit := engine.options.reference_batch_size, int):
            size = min(size, limit // self.count)
        fit = rows_that_fit(layout.size, device, engine.options.max_memory)
        return max(min(size, size if fit is None else fit // (self.count * passes)), 1)

    def _largest_of_pair(self, sample: Sequence[Tensor], column: Tensor) -> int:
        """Return the bytes of one pair in the largest tensor of a backward pass, as measured."""
        if self.engine.program.compiled is not None:  # compiled code is not measured
            return 0
        self.explain(sample, column)  # computes what depends on the references only
        with smallest_blocks(), LargestTensor() as largest:
            self.explain(sample, column)
        size: int = largest.size // self.count
        return size

    def explain(self, samples: Sequence[Tensor], columns: Tensor) -> Attributions:
        """Return the attributions of a batch of samples.

        Parameters
        ----------
        samples : sequence of Tensor
            The inputs of the program, explained ones first, with one row for each sample.
        columns : Tensor
            The outputs to explain of each sample, of shape (samples, outputs explained).
        """
        return self.engine.program.deferral(partial(self._explain, samples, columns))

    def _explain(self, samples: Sequence[Tensor], columns: Tensor) -> Attributions:
        program = self.engine.program
        version = program.bind_weights(self.explanation)
        references = self._references_of(samples, version)
        layout = self.engine.find_layout(samples, references.inputs)
        pairs = self.engine.pairs(samples, references, layout, averaged=True)
        output = pairs.output()
        check_output_count(output, self.outputs)
        output = output[:: len(output) // len(columns)]  # one row per sample, if they were tiled
        paired = references.output.unflatten(0, (-1, self.count))
        self._check_outputs(output, columns, paired)
        differences = [x.unsqueeze(1) - r for x, r in zip(samples, self.references, strict=False)]
        explain = self._by_input if self._carries_forward(columns) else self._by_output
        values = explain(pairs, differences, columns, paired)
        bound = len(samples) > program.explained
        return Attributions(values, output, (paired if bound else paired[:1]).mean(1))

    def _references_of(self, samples: Sequence[Tensor], version: tuple[Any, ...]) -> References:
        """Return the references of a batch: those of the background, for every sample."""
        engine, shared = self.engine, self._shared
        rows = len(samples[0]) * self.count
        if shared is not None and engine.has_references(shared, version):
            if len(shared.inputs[0]) == rows:
                return shared
        inputs = self._inputs(samples)
        layout = engine.find_layout(samples, inputs)
        on_tape = None if len(samples[0]) == 1 else rows  # stacked pairs are on one tape
        references = engine.current_references(inputs, layout, version, on_tape)
        self._shared = references if len(samples) == engine.program.explained else None
        return references

    def _by_output(
        self,
        pairs: SampleReferencePairs,
        differences: Sequence[Tensor],
        columns: Tensor,
        paired: Tensor,
    ) -> list[Tensor]:
        """Return the attributions, with one cotangent per output."""
        grads = [self._cotangent(column, paired) for column in columns.unbind(1)]
        by_output = pairs.backward_many(grads)
        return [
            torch.stack([self._mean(m[i], difference) for m in by_output], -1)
            for i, difference in enumerate(differences)
        ]

    def _by_input(
        self,
        pairs: SampleReferencePairs,
        differences: Sequence[Tensor],
        columns: Tensor,
        paired: Tensor,
    ) -> list[Tensor]:
        """Return the attributions, with one tangent per input element."""
        tangents = unit_tangents([difference.flatten(0, 1) for difference in differences])
        changes = self._carry(pairs, tangents)
        if changes is None:
            return self._by_output(pairs, differences, columns, paired)
        mean = changes.unflatten(0, paired.shape[:2]).mean(1)
        chosen = mean.gather(2, columns.unsqueeze(1).expand(-1, mean.shape[1], -1))
        sizes = [difference[0, 0].numel() for difference in differences]
        return [
            part.unflatten(1, difference.shape[2:]) if difference.dim() > 2 else part.squeeze(1)
            for part, difference in zip(chosen.split(sizes, 1), differences, strict=True)
        ]

    def _carries_forward(self, columns: Tensor) -> bool:
        """Return True if one tangent per input element costs less than one cotangent per output.

        A product with a tangent runs the graph backward and forward.
        """
        engine = self.engine
        elements = sum(r[0].numel() for r in self.references)
        return (
            2 * elements < columns.shape[1]
            and engine.is_linear is not False
            and engine.options.refinement.coalitions == 0
        )

    def _carry(self, pairs: SampleReferencePairs, tangents: Sequence[Tangents]) -> Tensor | None:
        """Return the changes of the outputs, of shape (pairs, tangents, outputs).

        ``None`` if a rule permits backward passes only: it is not linear in the cotangent, or it
        cannot be differentiated.
        """
        engine = self.engine
        try:
            changes = torch.stack(pairs.jvp_many(tangents), 1)
        except RuleError:
            if engine.is_linear:
                raise
            engine.is_linear = False
            return None
        if engine.is_linear is None:
            engine.is_linear = self._transposes(pairs, tangents, changes)
        return changes if engine.is_linear else None

    def _transposes(
        self, pairs: SampleReferencePairs, tangents: Sequence[Tangents], changes: Tensor
    ) -> bool:
        """Return True if the changes agree with a backward pass, to rounding."""
        generator = torch.Generator().manual_seed(0)
        grad = torch.randn(changes[:, 0].shape, generator=generator).to(changes)
        (multipliers,) = pairs.backward_many([grad])
        products = [
            torch.cat(
                [(m * t).flatten(1) for m, t in zip(multipliers, tangent, strict=True)], 1
            ).sum(1)
            for tangent in tangents
        ]
        terms = changes * grad.unsqueeze(1)
        error = (terms.sum(2) - torch.stack(products, 1)).abs().max()
        return bool(error <= ROUNDING * torch.finfo(terms.dtype).eps * terms.abs().sum(2).max())

    def _inputs(self, samples: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs of the program for the references of each sample."""
        rows = len(samples[0])
        inputs = [r.repeat(rows, *[1] * (r.dim() - 1)) for r in self.references]
        bound = samples[self.engine.program.explained :]
        return inputs + [x.repeat_interleave(self.count, 0) for x in bound]

    def _cotangent(self, column: Tensor, paired: Tensor) -> Tensor:
        """Return the cotangent of the output that is chosen for each sample, for all pairs."""
        unit = paired.new_zeros(len(column), paired.shape[-1])
        unit.scatter_(1, column[:, None], 1)
        return unit.repeat_interleave(self.count, 0)

    def _check_outputs(self, output: Tensor, columns: Tensor, paired: Tensor) -> None:
        infinite = torch.stack([~values.isfinite().all() for values in (output, paired)])
        if not any_unless_tracing(infinite):
            return
        pairs = torch.cat([output.repeat_interleave(self.count, 0), paired.flatten(0, 1)])
        for column in columns.unbind(1):
            check_finite_outputs(pairs, self._cotangent(column, paired))

    def _mean(self, multipliers: Tensor, difference: Tensor) -> Tensor:
        """Return the products of multipliers and differences, averaged over the references."""
        by_sample: Tensor = multipliers.detach().unflatten(0, (-1, self.count))
        mean: Tensor = (by_sample * difference).mean(1)
        return mean


def explain_in_batches(
    batches: PairBatches, samples: Sequence[Tensor], columns: Tensor, size: int | None = None
) -> Iterator[tuple[int, Attributions]]:
    """Yield the attributions of batch after batch, with the number of samples in each.

    All batches have as many samples, so that one tape serves them: the last one begins with some
    that the batch before has explained. When the device is out of memory, the batch is halved and
    the work goes on.

    Parameters
    ----------
    batches : PairBatches
    samples : sequence of Tensor
        The inputs of the program, with one row for each sample.
    columns : Tensor
        The outputs to explain of each sample, of shape (samples, outputs explained).
    size : int, optional
        How many samples a batch has; by default that of :meth:`PairBatches.batch_size`.
    """
    check_finite("samples", samples[: batches.engine.program.explained])
    size = 1 if batches.one_at_a_time else size or batches.batch_size(samples, columns)
    start, total = 0, len(columns)
    size = math.ceil(total / math.ceil(total / size)) if total else size
    logger.debug("explains %d samples at a time", size)
    while start < total:
        stop = min(start + size, total)
        first = max(stop - size, 0)
        try:
            batch = batches.explain([x[first:stop] for x in samples], columns[first:stop])
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = max(size // 2, 1)
            batches.engine.clear_cache()
            logger.debug("out of memory: %d samples at a time", size)
            continue
        yield stop - start, batch.from_sample(start - first)
        start = stop


def unit_tangents(differences: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return for every element of the inputs only its difference, and zeros for the others.

    Parameters
    ----------
    differences : sequence of Tensor
        The differences of sample and reference, one tensor per input, of shape (pairs, ...).
    """
    zeros = [difference.new_zeros(difference.shape) for difference in differences]
    tangents = []
    for index, difference in enumerate(differences):
        for element in range(difference[0].numel()):
            only = difference.new_zeros(difference.shape)
            only.flatten(1)[:, element] = difference.flatten(1)[:, element]
            tangents.append([*zeros[:index], only, *zeros[index + 1 :]])
    return tangents
