"""The graphs of one capture, bound to the present weights of the user's model."""

from __future__ import annotations

import cmath
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.autograd.compiled import CompiledBackward
from fxshap.autograd.tape import Tape, Taps
from fxshap.capture.captured import Captured
from fxshap.frontend.inputs import check_finite_weights
from fxshap.graph.nodes import tensor_at
from fxshap.passes.pipeline import RewrittenModel, rewrite
from fxshap.rules.smoothed_activations import no_variance
from fxshap.runtime.batching import check_assumed
from fxshap.runtime.transfers import Deferral


class Program:
    """The graphs of one capture, and the functions that run them.

    Parameters
    ----------
    model : nn.Module
        The user's model, whose weights the graphs share.
    captured : Captured
        The model's graph, or the suffix of it that begins at a layer.
    variances : bool
        Whether activations receive the variances of the sums before them.
    compile : bool
        Whether to compile the backward passes.
    plain : callable, optional
        ``plain(inputs)`` is the model's own output. If it is given, that of the graph is compared.

    Attributes
    ----------
    rewritten : RewrittenModel
    deferral : Deferral
        Runs explanations without reading the conditions of rules one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        variances: bool = False,
        compile: bool = False,
        plain: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.plain = plain
        self.captured = captured
        self.rewritten: RewrittenModel = rewrite(captured, variances)
        graph = self.rewritten.rescaled_graph
        self.compiled = CompiledBackward(graph, captured.explained) if compile else None
        self.deferral = Deferral()
        self._version: tuple[Any, ...] = ()
        self._explanation: Hashable = None
        self._sums: tuple[complex, ...] = ()

    @property
    def explained(self) -> int:
        """How many of the inputs, the first ones, are explained."""
        return self.captured.explained

    @property
    def rows(self) -> int | None:
        """The only number of rows that the graphs run on; ``None`` if any will do."""
        return self.captured.rows

    @torch.no_grad()
    def tapped(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Taps]:
        """Run the captured graph; return the output and the taps by name."""
        output, taps = self.rewritten.tapped_graph(*inputs)
        self.check_output(inputs, output)
        return output, dict(zip(self.rewritten.tap_names, taps, strict=True))

    @torch.no_grad()
    def check_output(self, inputs: Sequence[Tensor], output: Tensor) -> None:
        """Raise if the output of a graph that is not that of all inputs is not the model's."""
        if self.plain is not None:
            check_assumed(output, self.plain(inputs))

    @torch.no_grad()
    def output(self, inputs: Sequence[Tensor]) -> Tensor:
        """Run the captured graph on any number of rows; return the output only."""
        graph, rows, count = self.rewritten.output_graph, self.rows, len(inputs[0])
        if rows is None:
            output: Tensor = graph(*inputs)
        else:
            padded = [torch.cat([x, x[-1:].expand(-count % rows, *x.shape[1:])]) for x in inputs]
            batches = zip(*(x.split(rows) for x in padded), strict=True)
            output = torch.cat([graph(*batch) for batch in batches])[:count]
        self.check_output(inputs, output)
        return output

    @torch.no_grad()
    def with_variances(
        self, reference: Taps, sample: Taps, inputs: Sequence[Tensor]
    ) -> tuple[Taps, Taps]:
        """Return the taps of two endpoints with the variances between them.

        Parameters
        ----------
        reference, sample : dict of str to Tensor
        inputs : sequence of Tensor
            With as many rows as the reference has.
        """
        names, graph = self.rewritten.variance_tap_names, self.rewritten.variance_graph
        if graph is None:
            return reference, sample
        variances = graph(reference, sample, *inputs)
        none = {name: no_variance(v) for name, v in zip(names, variances, strict=True)}
        return {**reference, **none}, {**sample, **dict(zip(names, variances, strict=True))}

    def tape(self, references: Sequence[Tensor], max_batched: int = 1, reused: bool = True) -> Tape:
        """Record the rescaled graph on references.

        Parameters
        ----------
        references : sequence of Tensor
            One tensor per input, of shape (references, ...).
        max_batched : int
            The largest number of cotangents in one batched backward pass.
        reused : bool
            Whether the tape serves many samples, so that compiling its backward pass pays.
        """
        compiled = self.compiled if reused else None
        record = partial(compiled.record, references) if compiled is not None else None
        graph = self.rewritten.rescaled_graph
        return Tape(graph, references, self.explained, max_batched, record)

    def bind_weights(self, explanation: Hashable) -> tuple[Any, ...]:
        """Point the graphs at the model's present weights.

        Parameters
        ----------
        explanation : hashable
            Identifies one explanation, of many calls. Edits of ``weight.data`` leave the version
            of a tensor as it is, so the sums of the weights are compared once per explanation.

        Returns
        -------
        tuple
            Changes when a weight changes.

        Raises
        ------
        WeightError
            If a weight is NaN or infinite.
        """
        paths = self.captured.weights
        weights = [tensor_at(self.model, path) for path in paths.values()]
        if explanation != self._explanation:
            sums = weight_sums(weights)
            if not all(map(cmath.isfinite, sums)):
                check_finite_weights(dict(zip(paths.values(), weights, strict=True)))
            self._explanation, self._sums = explanation, sums
        version = (*((weight.data_ptr(), weight._version) for weight in weights), self._sums)
        if version != self._version:
            self._version = version
            self.rewritten.bind(dict(zip(paths, weights, strict=True)))
        return version


def weight_sums(weights: Sequence[Tensor]) -> tuple[complex, ...]:
    """Return the sum of every tensor, with one transfer from each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for weight in weights:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        groups.setdefault((weight.device, dtype), []).append(weight.detach().sum(dtype=dtype))
    return tuple(value for sums in groups.values() for value in torch.stack(sums).tolist())
