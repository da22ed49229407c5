"""One capture of a model, the tape of its latest references, and the walks over it."""

from __future__ import annotations

import cmath
import logging
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.autograd.compiled import CompiledBackward
from fxshap.autograd.tape import BackwardFn, Taps
from fxshap.capture.captured import Captured
from fxshap.frontend.inputs import check_finite, check_finite_weights
from fxshap.frontend.outputs import check_finite_outputs
from fxshap.graph.nodes import tensor_at
from fxshap.passes.pipeline import RewrittenModel, rewrite
from fxshap.passes.split_at_layer import ModelPrefix
from fxshap.rules.smoothed_activations import no_variance
from fxshap.runtime.batching import BatchLayout, check_densified, probe_layout
from fxshap.runtime.coalitions import Refinement
from fxshap.runtime.pairs import SampleReferencePairs
from fxshap.runtime.prefetch import EMPTY_CACHE, MultiplierCache
from fxshap.runtime.references import ReferenceBatchSize, References, rows_that_fit

logger = logging.getLogger("fxshap")

#: References on which what is computed at all places is compared with what the model computes.
COMPARED_ROWS = 16


class Engine:
    """One capture of the model and the tape of its latest references.

    Parameters
    ----------
    model : nn.Module
    captured : Captured
        The model's graph, or the head of it.
    refinement : Refinement
        How many coalitions to walk through.
    reference_chunk : int or "auto"
        How many references go onto one tape.
    trunk : Trunk, optional
        What leads to the head.
    compile : bool
        Whether to compile the walks.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        refinement: Refinement,
        reference_chunk: ReferenceBatchSize,
        trunk: ModelPrefix | None = None,
        compile: bool = False,
    ) -> None:
        self.model = model
        self.captured = captured
        self.refinement = refinement
        self.reference_chunk = reference_chunk
        self.trunk = trunk
        self.rewritten: RewrittenModel = rewrite(self.captured, refinement.variances)
        self.fused = (
            CompiledBackward(self.rewritten.rescaled_graph, captured.explained) if compile else None
        )
        self.layout: BatchLayout | None = None
        self.references: References | None = None
        self.references_key: tuple[Any, ...] = ()
        self.answers = EMPTY_CACHE
        self.version: tuple[Any, ...] = ()
        self.asked: Hashable = None
        self.sums: tuple[complex, ...] = ()

    def enter(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return what the graph takes for inputs of the model."""
        return list(inputs) if self.trunk is None else self.trunk(self.model, inputs)

    def explain(
        self, samples: Sequence[Tensor], references: Sequence[Tensor], asked: Hashable
    ) -> tuple[BackwardFn, Tensor]:
        """Return the walk that gives multipliers, and the outputs of both ends.

        Parameters
        ----------
        samples, references : sequence of Tensor
            One tensor an input of the graph, with as many rows each.
        asked : hashable
            Tells one explanation, of many calls, from the next.
        """
        version = self.bind_weights(asked)
        if all(bool((x == x[:1]).all()) for x in samples):
            samples = [x[:1] for x in samples]
        check_finite("sample", samples[: self.captured.explained])
        layout = self.layout_of(samples, references)
        held = self.references_of(references, layout, version)
        pairs = SampleReferencePairs(
            self.observe, self.complete, layout, self.refinement, samples, held
        )
        if not pairs.single:
            return with_finite_check(pairs.walk, torch.cat([pairs.output(), held.output]))
        if self.answers.explanation != asked or self.answers.references is not held:
            self.answers = MultiplierCache(asked, held)
        answer = self.answers.of(samples)
        if answer.output is None:
            answer.output = pairs.output()
        alike = answer.output.expand(len(references[0]), *answer.output.shape[1:])
        walk = partial(self.answers.walk, answer, pairs.walks)
        return with_finite_check(walk, torch.cat([alike, held.output]))

    @torch.no_grad()
    def observe(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Taps]:
        """Run the captured graph; return the output and the taps by name."""
        output, taps = self.rewritten.tapped_graph(*inputs)
        return output, dict(zip(self.rewritten.tap_names, taps, strict=True))

    @torch.no_grad()
    def complete(
        self, reference: Taps, sample: Taps, inputs: Sequence[Tensor]
    ) -> tuple[Taps, Taps]:
        """Return the taps of two ends with the variances between them.

        Parameters
        ----------
        reference, sample : dict of str to Tensor
        inputs : sequence of Tensor
            Of as many rows as the reference has.
        """
        names, measure = self.rewritten.variance_tap_names, self.rewritten.variance_graph
        if measure is None:
            return reference, sample
        found = measure(reference, sample, *inputs)
        none = {name: no_variance(v) for name, v in zip(names, found, strict=True)}
        return {**reference, **none}, {**sample, **dict(zip(names, found, strict=True))}

    def layout_of(self, samples: Sequence[Tensor], references: Sequence[Tensor]) -> BatchLayout:
        """Return where the batch lies in every tap, found out at the first explanation."""
        if self.layout is None:
            if self.rewritten.masked_graph is not None:
                few = [r[: self.captured.rows or COMPARED_ROWS] for r in references]
                check_densified(self.rewritten.tapped_graph, self.rewritten.masked_graph, few)
            pairs = [torch.cat([r[:1], x[:1]]) for r, x in zip(references, samples, strict=True)]
            self.layout = probe_layout(
                self.rewritten.tapped_graph, pairs, self.captured.rows, self.captured.explained
            )
            how = "as many copies of itself" if self.layout.tile else "as one row"
            logger.debug("a sample is run %s", how)
        return self.layout

    def references_of(
        self, inputs: Sequence[Tensor], layout: BatchLayout, version: tuple[Any, ...]
    ) -> References:
        """Return these references with their tape, recorded again when anything has changed."""
        held = self.references
        if held is None or self.references_key != version or not held.are(inputs):
            self.references, self.answers = None, EMPTY_CACHE  # let go of the old ones first
            rows = self.rows_of_tape(inputs, layout)
            held = References(
                self.rewritten.rescaled_graph,
                inputs,
                self.captured.explained,
                rows,
                layout.abreast(len(inputs[0]), self.fused is not None),
                self.fused,
            )
            self.references, self.references_key = held, version
            logger.debug("recorded %d references, %d to a tape", len(inputs[0]), rows)
        return held

    def rows_of_tape(self, inputs: Sequence[Tensor], layout: BatchLayout) -> int:
        """Return how many references go onto one tape."""
        count, chunk = len(inputs[0]), self.reference_chunk
        if self.captured.rows is not None:  # nothing else runs
            return count
        size = layout.size * (2 if self.refinement.pairs else 1)  # a coalition and its complement
        size *= 2 if self.rewritten.variance_graph else 1  # as many variances as taps
        fit = rows_that_fit(size, inputs[0].device) if chunk == "auto" else chunk
        return count if fit is None else min(fit, count)

    def release(self) -> None:
        """Let go of the tape and of the answers found ahead."""
        self.references, self.answers = None, EMPTY_CACHE

    def bind_weights(self, asked: Hashable) -> tuple[Any, ...]:
        """Point the graphs at the model's present weights; return what tells if they change."""
        weights = [tensor_at(self.model, path) for path in self.captured.weights.values()]
        if asked != self.asked:  # once an explanation: edits of `.data` leave the version alone
            sums = weight_sums(weights)
            if not all(map(cmath.isfinite, sums)):
                check_finite_weights(
                    dict(zip(self.captured.weights.values(), weights, strict=True))
                )
            self.asked, self.sums = asked, sums
        version = (*((weight.data_ptr(), weight._version) for weight in weights), self.sums)
        if version != self.version:
            self.version = version
            self.rewritten.bind(dict(zip(self.captured.weights, weights, strict=True)))
        return version


def with_finite_check(walk: BackwardFn, output: Tensor) -> tuple[BackwardFn, Tensor]:
    """Return a walk and the output, or one that looks first whether the outputs asked for are."""
    if bool(output.isfinite().all()):
        return walk, output

    def careful(grad: Tensor) -> list[Tensor]:
        check_finite_outputs(output, grad)
        return walk(grad)

    return careful, output


def weight_sums(weights: Sequence[Tensor]) -> tuple[complex, ...]:
    """Return the sum of every tensor."""
    single = torch.float32
    return tuple(
        weight.detach().sum(dtype=torch.promote_types(weight.dtype, single)).item()
        for weight in weights
    )
