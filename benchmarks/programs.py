"""The graphs of a model, for benchmarks that try other coalitions than the library's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fxshap.autograd.tape import Multipliers, Taps
from fxshap.capture.export import capture
from fxshap.runtime.coalitions import CoalitionPasses
from fxshap.runtime.program import Program


def bound_program(model: nn.Module, inputs: Sequence[Tensor], variances: bool = False) -> Program:
    """Capture a model, and bind the graphs to its weights."""
    program = Program(model, capture(model.eval(), inputs), variances)
    program.bind_weights(object())
    return program


def coalition_passes(
    program: Program,
    samples: Sequence[Tensor],
    references: Sequence[Tensor],
    grads: Sequence[Tensor],
    observe: Callable[[Taps, Taps], None] = lambda start, end: None,
) -> CoalitionPasses:
    """Return backward passes between hybrids of samples and references.

    Parameters
    ----------
    program : Program
    samples, references : sequence of Tensor
        One tensor per input, with as many rows each.
    grads : sequence of Tensor
        One cotangent per output, with as many rows.
    observe : callable
        Receives the taps of both endpoints of every pass.
    """
    tape = program.tape(references)

    def backward(start: Taps, end: Taps) -> Multipliers:
        observe(start, end)
        return tape.backward_many(*program.with_variances(start, end, references), grads)

    return CoalitionPasses(
        tapped=lambda points: [program.tapped(point)[1] for point in points],
        backward=backward,
        samples=samples,
        references=references,
        sample=program.tapped(samples)[1],
        reference=tape.references,
    )
