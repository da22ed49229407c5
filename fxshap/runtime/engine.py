"""One capture of a model, the tape of its latest references, and the backward passes over it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxshap.autograd.tape import BackwardFn
from fxshap.errors import BatchMixingError, CaptureError
from fxshap.frontend.inputs import check_finite
from fxshap.frontend.outputs import check_finite_outputs
from fxshap.passes.split_at_layer import ModelPrefix
from fxshap.runtime.batching import BatchLayout, allclose_to_largest, check_densified, probe_layout
from fxshap.runtime.budget import Speed, measure_speed, refinement_within_budget
from fxshap.runtime.decisions import (
    DecisionCheck,
    with_two_rows_at_least,
    without_repetitions,
)
from fxshap.runtime.exact import ExactGame
from fxshap.runtime.options import Options
from fxshap.runtime.pairs import SampleReferencePairs
from fxshap.runtime.prefetch import EMPTY_CACHE, MAX_BYTES, MultiplierCache
from fxshap.runtime.program import Program
from fxshap.runtime.references import References, rows_that_fit
from fxshap.runtime.transfers import bytes_of, read_cotangent, read_rows
from fxshap.state import restore_state

logger = logging.getLogger("fxshap")

#: References on which densified masked operations are compared with the model's own.
COMPARED_ROWS = 16


class Engine:
    """One capture of the model and the tape of its latest references.

    Parameters
    ----------
    program : Program
        The graphs of the model, or of its suffix.
    options : Options
    prefix : ModelPrefix, optional
        Leads from the model's inputs to the inputs of the program.
    output : callable, optional
        ``output(inputs)`` runs the user's model and returns the output that is explained.
    """

    def __init__(
        self,
        program: Program,
        options: Options,
        prefix: ModelPrefix | None = None,
        output: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> None:
        self.program = program
        self.options = options
        self.prefix = prefix
        self.output = output
        #: The attributes that the model assigns, as they were when the graph was compared last.
        self.state: dict[Any, Any] = {}
        self.decisions = (
            None if output is None else DecisionCheck(output, self.run_graph, program.captured)
        )
        self.layout: BatchLayout | None = None
        self.references: References | None = None
        self.references_version: tuple[Any, ...] = ()
        self.cache = EMPTY_CACHE
        #: Bytes of one pair in the largest tensor of a backward pass; ``None`` until measured.
        self.largest: int | None = None
        #: Whether every rule is linear in the cotangent; ``None`` until it was tried.
        self.is_linear: bool | None = None
        self.games: dict[bytes, ExactGame] = {}
        self.speed: Speed | None = None

    def program_inputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs of the program for inputs of the model."""
        return list(inputs) if self.prefix is None else self.prefix(self.program.model, inputs)

    def prepare(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Check the program on inputs of the model; return what is explained of its own inputs."""
        own = self.program_inputs(inputs)
        self.program.bind_weights(object())
        self.find_layout(own, own)
        return own[: self.program.explained]

    def run_graph(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the output of the captured graph for inputs of the model."""
        return self.program.tapped(self.program_inputs(inputs))[0]

    def holds(self, inputs: Sequence[Tensor]) -> bool:
        """Return True if what does not depend on the explained inputs is decided as captured.

        Parameters
        ----------
        inputs : sequence of Tensor
            One tensor per input of the model.
        """
        if self.program.rows not in (None, len(inputs[0])):
            return True  # they are run in batches of another size
        return self.program.captured.guards.hold(self.program.model, inputs)

    @torch.no_grad()
    def computes_each_row(self, inputs: Sequence[Tensor]) -> bool:
        """Return True if the graph computes every row as the model does that row separately.

        Python code may read the bound arguments of all rows, as ``int(lengths.max())`` and
        ``lengths.tolist()`` do. Then a row may be computed otherwise next to others.

        Parameters
        ----------
        inputs : sequence of Tensor
            One tensor per input of the model.
        """
        if self.output is None or not self.program.captured.guards.expected:
            return True
        count = self.program.rows or 2
        copies = [
            [x[row : row + 1].expand(count, *x.shape[1:]) for x in inputs]
            for row in range(len(inputs[0]))
        ]
        with restore_state(self.program.model):
            separate = torch.cat([self.output(rows)[:1] for rows in copies])
        if self.program.rows is None:
            return allclose_to_largest(self.run_graph(inputs), separate)
        return allclose_to_largest(torch.cat([self.run_graph(x)[:1] for x in copies]), separate)

    def has_state(self, state: dict[Any, Any], inputs: Sequence[Tensor]) -> bool:
        """Return True if the graph computes what the model does in its present state.

        Most attributes that ``forward`` assigns, such as stored attention weights, change no
        output. A hidden state does. The two are compared once the state has changed.

        Parameters
        ----------
        state : dict
            The attributes that the model assigns, from :func:`~fxshap.runtime.settings.state_of`.
        inputs : sequence of Tensor
            One tensor per input of the model.
        """
        if state == self.state or self.output is None:
            return True
        if self.program.rows not in (None, len(inputs[0])):
            return True  # they are run in batches of another size
        with torch.no_grad(), restore_state(self.program.model):
            own = self.output(inputs)
        if not allclose_to_largest(self.run_graph(inputs), own):
            return False
        self.state = state
        return True

    def check_decisions(
        self, samples: Sequence[Tensor], references: Sequence[Tensor], explanation: Hashable
    ) -> None:
        """Raise an InputError if the model decides otherwise than in the capture.

        Parameters
        ----------
        samples, references : sequence of Tensor
            One tensor per input of the model.
        explanation : hashable
            Identifies one explanation, of many calls.
        """
        if self.decisions is not None and self.decisions.is_needed:
            if self.program.rows is None:
                references = with_two_rows_at_least(references)
                samples = with_two_rows_at_least(without_repetitions(samples))
            self.decisions("references", references, explanation)
            self.decisions("sample", samples, explanation)

    def explain(
        self,
        samples: Sequence[Tensor],
        references: Sequence[Tensor],
        explanation: Hashable,
        averaged: bool = False,
    ) -> tuple[BackwardFn, Tensor]:
        """Return the backward pass that gives multipliers, and the outputs at both endpoints.

        The output, its cotangent and the multipliers have rows ``[samples; references]``.

        Parameters
        ----------
        samples, references : sequence of Tensor
            One tensor per input of the program, with as many rows each.
        explanation : hashable
            Identifies one explanation, of many calls.
        averaged : bool
            Whether the attributions will be averaged over the references of each sample.
        """
        explained = self.program.explained
        version = self.program.bind_weights(explanation)
        known = self.references if self.references_version == version else None
        rows = read_rows(samples, explained, references, known.inputs if known else None)
        if rows.repeated:
            samples = [x[:1] for x in samples]
        if not (rows.repeated and rows.finite):
            check_finite("sample", samples[:explained])
        layout = self.find_layout(samples, references)
        current = known if known and rows.same_references else None
        del known  # the old tape is freed before a new one is recorded
        current = current or self.new_references(references, layout, version)
        pairs = self.pairs(samples, current, layout, averaged)
        if not pairs.single:
            output = torch.cat([pairs.output(), current.output])
            return partial(backward_of_halves, output, lambda grad, _: pairs.backward(grad)), output
        if self.cache.explanation != explanation or self.cache.references is not current:
            self.cache = MultiplierCache(explanation, current)
        cached = self.cache.for_sample(rows.first_row)
        if cached.output is None:
            cached.output = pairs.output()
        repeated = cached.output.expand(len(references[0]), *cached.output.shape[1:])
        output = torch.cat([repeated, current.output])
        backward = partial(self.cache.backward, cached, pairs.backward_many)
        return partial(backward_of_halves, output, backward), output

    def find_layout(self, samples: Sequence[Tensor], references: Sequence[Tensor]) -> BatchLayout:
        """Return the batch dimension of every tap, probed at the first explanation."""
        if self.layout is None:
            try:
                self.layout = self._probe_layout(samples, references)
            except (BatchMixingError, CaptureError) as error:
                self._check_bound_rows(samples, error)
                raise
            how = "as many copies of itself" if self.layout.tile else "as one row"
            logger.debug("a sample is run %s", how)
        return self.layout

    def _probe_layout(self, samples: Sequence[Tensor], references: Sequence[Tensor]) -> BatchLayout:
        rewritten, rows = self.program.rewritten, self.program.rows
        if rewritten.masked_graph is not None:
            few = [r[: rows or COMPARED_ROWS] for r in references]
            check_densified(rewritten.tapped_graph, rewritten.masked_graph, few)
        pairs = [torch.cat([r[:1], x[:1]]) for r, x in zip(references, samples, strict=True)]
        if rewritten.shared_graph is not None:
            probe_layout(rewritten.shared_graph, pairs, rows, self.program.explained)
        return probe_layout(rewritten.tapped_graph, pairs, rows, self.program.explained)

    def _check_bound_rows(self, samples: Sequence[Tensor], error: Exception) -> None:
        """Raise if the rows are computed otherwise because Python reads what is bound of each."""
        differ = any(bool((x != x[:1]).any()) for x in samples[self.program.explained :])
        if differ and self.program.rows is not None and self.program.captured.guards.expected:
            raise BatchMixingError(
                "the model reads in Python what is bound for each row (as in `lengths.tolist()`), "
                "and computes something else for every row of this batch; explain one sample in "
                "each call, or all samples with fxshap.DeepExplainer, whose shap_values takes such "
                "arguments by their names"
            ) from error

    def has_references(self, references: References, version: tuple[Any, ...]) -> bool:
        """Return True if these references are recorded, with the weights as they are."""
        return self.references is references and self.references_version == version

    def current_references(
        self,
        inputs: Sequence[Tensor],
        layout: BatchLayout,
        version: tuple[Any, ...],
        rows: int | None = None,
    ) -> References:
        """Return these references with their tape, recorded again when anything has changed.

        Takes the arguments of :meth:`new_references`.
        """
        current = self.references if self.references_version == version else None
        if current and rows in (None, current.rows) and current.equal(inputs):
            return current
        return self.new_references(inputs, layout, version, rows)

    def new_references(
        self,
        inputs: Sequence[Tensor],
        layout: BatchLayout,
        version: tuple[Any, ...],
        rows: int | None = None,
    ) -> References:
        """Record references in place of those of the call before.

        Parameters
        ----------
        inputs : sequence of Tensor
        layout : BatchLayout
        version : tuple
            Of the weights, from :meth:`Program.bind_weights`.
        rows : int, optional
            How many of the references are on one tape; by default as many as fit.
        """
        self.clear_cache()  # free the memory of the old ones first
        rows = self.rows_per_tape(inputs, layout) if rows is None else rows
        self.references = self.record(inputs, layout, rows)
        self.references_version = version
        return self.references

    def pairs(
        self,
        samples: Sequence[Tensor],
        references: References,
        layout: BatchLayout,
        averaged: bool,
    ) -> SampleReferencePairs:
        """Return samples paired with references, refined as the options ask."""
        options = self.options
        refinement = options.refinement
        pairs = SampleReferencePairs(self.program, layout, options, samples, references, averaged)
        if refinement.coalitions not in ("exact", "auto"):
            return pairs
        game = self.game(samples, references, layout)
        if refinement.coalitions == "exact":
            game.check_affordable()
            pairs.game = game
            return pairs
        self.speed = self.speed or measure_speed(pairs, game)
        chosen = refinement_within_budget(refinement, self.speed, game)
        logger.debug("refine='auto' chose %r within %s", chosen.coalitions, self.speed)
        if chosen.coalitions == "exact":
            pairs.game = game
        pairs.options = replace(options, refinement=chosen)
        return pairs

    def game(
        self, samples: Sequence[Tensor], references: References, layout: BatchLayout
    ) -> ExactGame:
        """Return the coalition games of samples, cached for further outputs."""
        explained = samples[: self.program.explained]
        key = torch.cat([bytes_of(x) for x in explained]).cpu().numpy().tobytes()
        if key not in self.games:
            self.games[key] = ExactGame(
                self.program,
                layout,
                self.options.refinement,
                explained,
                references.inputs,
                self.options.progress,
            )
        self.games[key] = self.games.pop(key)  # the latest last
        size = references.size + references.output.nbytes
        while len(self.games) > max(MAX_BYTES // size, 1):
            del self.games[next(iter(self.games))]
        return self.games[key]

    def record(self, inputs: Sequence[Tensor], layout: BatchLayout, rows: int) -> References:
        """Record references, with `rows` of them on one tape."""
        compiled = self.program.compiled is not None
        max_batched = layout.max_batched(len(inputs[0]), inputs[0].device, compiled)
        references = References(self.program, inputs, rows, max_batched)
        logger.debug("recorded %d references, %d to a tape", len(inputs[0]), rows)
        return references

    def rows_per_tape(self, inputs: Sequence[Tensor], layout: BatchLayout) -> int:
        """Return how many references go onto one tape."""
        count, size = len(inputs[0]), self.options.reference_batch_size
        if self.program.rows is not None:  # nothing else runs
            return count
        hybrids = self.options.refinement.coalitions not in (0, "exact")
        row = layout.size * (2 if hybrids else 1)  # a complementary pair
        row *= 2 if self.program.rewritten.variance_graph else 1  # as many variances as taps
        fit = (
            rows_that_fit(row, inputs[0].device, self.options.max_memory)
            if size == "auto"
            else size
        )
        return count if fit is None else min(fit, count)

    def clear_cache(self) -> None:
        """Free the tape and what was computed with it."""
        self.references, self.cache, self.games, self.speed = None, EMPTY_CACHE, {}, None


def backward_of_halves(
    output: Tensor, backward: Callable[[Tensor, int | None], list[Tensor]], grad: Tensor
) -> list[Tensor]:
    """Give both rows of a pair the multipliers of the pair, each for its own cotangent.

    Parameters
    ----------
    output : Tensor
        The outputs of the samples and of the references.
    backward : callable
        Returns the multipliers for the cotangent of one half, and its only column if it has one.
    grad : Tensor
        The cotangent of `output`.

    Raises
    ------
    OutputError
        If an output that is explained is not finite.
    """
    reading, halves = read_cotangent(grad, output), grad.chunk(2)
    # Libraries that differentiate the sum over all rows pass the same cotangent twice.
    columns = (reading.column,) if reading.same else (reading.column, None)
    each = []
    for half, column in zip(halves, columns, strict=False):
        if not reading.finite:
            check_finite_outputs(output, half)
        each.append(backward(half, column))
    return [torch.cat(pair) for pair in zip(each[0], each[-1], strict=True)]
