"""Capture of an ``nn.Module`` and its inputs as one functional ATen graph.

``torch.export`` runs the model under a tracer at the level of PyTorch's dispatcher, so any Python
code can be captured. It returns a graph without in-place operations or module calls, with a
symbolic batch dimension. Weights are not copied: the graph holds views of the model's own storage.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.export import Dim, ExportedProgram

from fxshap._compat import export_workarounds
from fxshap.capture.captured import Captured
from fxshap.capture.decisions import check_decisions
from fxshap.capture.diagnostics import (
    DataDependentError,
    explain_failure,
    first_line,
    has_adaptive_steps,
    is_data_dependent,
    takes_values,
)
from fxshap.capture.functionalize import functionalize
from fxshap.capture.readings import Answers, Trace
from fxshap.capture.real_values import named_tensors
from fxshap.capture.row_number import check_any_number, check_fixed_number
from fxshap.capture.selected_output import ModelCall, SelectedOutput, call_positionally
from fxshap.capture.sparse import dense_constants
from fxshap.capture.unlift import unlift
from fxshap.errors import CaptureError, FxshapError
from fxshap.frontend.hook_point import HookPoint
from fxshap.frontend.outputs import Selector

logger = logging.getLogger("fxshap")


def capture(
    model: nn.Module,
    inputs: Sequence[Tensor],
    output: Selector = None,
    explained: int | None = None,
    call: ModelCall = call_positionally,
    hook_point: HookPoint | None = None,
) -> Captured:
    """Capture `model` as a functional ATen graph.

    Parameters
    ----------
    model : nn.Module
        The user's model, in the mode to capture. It is not changed.
    inputs : sequence of Tensor
        Example inputs with the batch first. Their values do not matter. A model that fixes its
        number of rows in Python, as ``len(x)`` does, is captured for the number of rows of these.
    output : str, int, callable or None
        Which output to explain.
    explained : int, optional
        How many of the inputs are explained. They come first. The others are the same for samples
        and references. By default all inputs are explained.
    call : callable
        ``call(model, inputs)`` calls the model.
    hook_point : HookPoint, optional
        A point in the model. If it is given, the graph returns
        ``(output, (tensors at the hook point))``.

    Returns
    -------
    Captured

    Raises
    ------
    CaptureError
        If the model cannot be captured. The message names the user's line.
    OutputError
        If the output is not a floating-point tensor.
    """
    check_not_quantized(model)
    start = time.perf_counter()
    count = len(inputs) if explained is None else explained
    selected = SelectedOutput(model, output, call, hook_point, count)
    own = [x.detach() for x in inputs]
    # Decisions by bound arguments may depend on all their rows.
    few = own if any(map(rows_differ, own[count:])) else [with_two_rows(x) for x in own]
    with dense_constants(model):
        captured = capture_decisions(selected, own, few, count)
        if captured.rows not in (None, len(own[0])):
            selected.runs_twice = len(own[0]) == 1 and hook_point is None
            fewer, captured = captured, capture_decisions(selected, own, own, count)
            check_fixed_number(captured, fewer)
    check_any_number(captured)
    captured = replace(captured, assumed=selected.groups.assumed)
    seconds, nodes = time.perf_counter() - start, len(captured.module.graph.nodes)
    rows = "any number of" if captured.rows is None else captured.rows
    logger.debug(
        "captured %s for %s rows: %d nodes in %.1f s", type(model).__name__, rows, nodes, seconds
    )
    return captured


def check_not_quantized(model: nn.Module) -> None:
    """Raise a CaptureError if a module holds packed quantized weights, which have no derivative."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.") and hasattr(module, "_packed_params"):
            raise CaptureError(
                f"{name or 'the model'} is a {type(module).__module__}.{type(module).__name__}, "
                "whose quantized weights have no derivative; explain the model as it was before "
                "quantize_dynamic or convert"
            )


def with_two_rows(x: Tensor) -> Tensor:
    """Return the first two rows, or the only row twice: export specialises on a single row."""
    return x[:2] if len(x) > 1 else torch.cat([x, x])


def rows_differ(x: Tensor) -> bool:
    """Return True if the rows of a tensor are not all the same."""
    return bool((x != x[:1]).any())


def capture_decisions(
    selected: SelectedOutput, inputs: Sequence[Tensor], few: Sequence[Tensor], explained: int
) -> Captured:
    """Export a model, and check what its decisions by the explained inputs change.

    Parameters
    ----------
    selected : SelectedOutput
    inputs, few : sequence of Tensor
        As in :func:`export`.
    explained : int
        How many of the inputs are explained.
    """
    exported = export(selected, inputs, few, explained)
    trace = exported.trace

    def retrace(answers: Answers) -> Captured:
        other = replace(trace, answers=answers)
        program = export_with_strategy(selected, exported.strategy, other)
        return unlift(program, selected.model, explained, other.readings)

    captured = unlift(exported.program, selected.model, explained, trace.readings)
    if captured.readings:
        captured = check_decisions(captured, trace, retrace)
    expected = captured.guards.read(selected.model, trace.inputs)
    return replace(captured, guards=replace(captured.guards, expected=expected))


# --- torch.export -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportStrategy:
    """A way to export a model.

    Attributes
    ----------
    strict : bool
        Whether TorchDynamo interprets the model's Python code instead of running it. Only then can
        NumPy code be captured.
    symbolic : bool
        Whether the graph is for any number of rows.
    cast : bool
        Whether the casts that autocast inserts are recorded as operations. Otherwise the region
        under autocast is recorded, in which torch cannot decompose some operations.
    reads : bool
        Whether what Python reads from tensors is answered and recorded.
    """

    strict: bool = False
    symbolic: bool = True
    cast: bool = False
    reads: bool = True


#: Tried in this order. The first is the quickest and captures the most models.
EXPORT_STRATEGIES = (
    ExportStrategy(),
    ExportStrategy(cast=True),  # also sees what is read inside of composite operations
    ExportStrategy(reads=False),
    ExportStrategy(strict=True, reads=False),
    ExportStrategy(symbolic=False),
)


@dataclass(frozen=True)
class Exported:
    """What an export returns.

    Attributes
    ----------
    program : ExportedProgram
    strategy : ExportStrategy
        The one that worked.
    trace : Trace
        What was exported with, and what Python has read.
    """

    program: ExportedProgram
    strategy: ExportStrategy
    trace: Trace


def export_after_autocast(*args: Any, **kwargs: Any) -> ExportedProgram:
    """Export below the level at which autocast acts, which has no public name."""
    from torch.export import _trace  # imports TorchDynamo, which takes seconds

    program: ExportedProgram = _trace._export(*args, pre_dispatch=False, **kwargs)
    return program


def export(
    model: SelectedOutput, inputs: Sequence[Tensor], few: Sequence[Tensor], explained: int
) -> Exported:
    """Export with the first strategy that works, and decompose composite operations.

    Python gets no number that depends on the explained inputs, unless nothing works without.

    Parameters
    ----------
    model : SelectedOutput
    inputs : sequence of Tensor
        The inputs of the call. Errors name their shapes.
    few : sequence of Tensor
        What to export with: fewer rows of them, or the inputs themselves.
    explained : int
        How many of the inputs are explained.
    """
    trace = Trace(few, explained, named_tensors(model.model))
    failures: list[Exception] = []
    left_out = 0
    for strategy in EXPORT_STRATEGIES:
        try:
            return Exported(export_with_strategy(model, strategy, trace), strategy, trace)
        except FxshapError:
            check_accepted(model, inputs, few)
            raise
        except Exception as error:
            failures.append(error)
        left_out += trace.left_out
        logger.debug("not captured (%s): %s", strategy, first_line(failures[-1]))
        if len(failures) == 1:
            check_accepted(model, inputs, few)
            if few is not inputs and not model.accepts(few):  # it takes these rows only
                return export(model, inputs, inputs, explained)
        if has_adaptive_steps(failures[-1]):
            raise CaptureError(explain_failure(failures[-1])) from failures[-1]
        if takes_values(failures[-1]):
            program = export_groups(model, trace, inputs)
            if program is not None:
                return Exported(program, EXPORT_STRATEGIES[0], trace)
        if is_data_dependent(failures[-1]):
            break
    trace.answers = Answers(varying=True)
    for strategy in (s for s in EXPORT_STRATEGIES if s.reads and s.symbolic and left_out):
        try:
            return Exported(export_with_strategy(model, strategy, trace), strategy, trace)
        except Exception as error:
            logger.debug("not captured with all readings (%s): %s", strategy, first_line(error))
    raise CaptureError(explain_failure(failures[0])) from failures[0]


def check_accepted(model: SelectedOutput, inputs: Sequence[Tensor], few: Sequence[Tensor]) -> None:
    """Raise if the model itself fails: its own error is more helpful than that of an export.

    Some models take a single row only among others, as ``squeeze()`` removes its dimension.
    """
    if len(inputs[0]) > 1 or not model.accepts(few):
        model.check(inputs)


def export_groups(
    model: SelectedOutput, trace: Trace, inputs: Sequence[Tensor]
) -> ExportedProgram | None:
    """Export the graph of inputs that leave no group empty; return ``None`` if that fails too."""
    model.groups.enumerates = True
    try:  # sizes that Python reads would fix the number of rows
        program = export_with_strategy(model, ExportStrategy(reads=False), trace)
        if model.groups.counted:
            check_counts_unused(program, model, inputs)
        return program
    except Exception as error:  # the first failure names the line
        logger.debug("not captured with all groups: %s", first_line(error))
        model.groups.enumerates = model.groups.assumed = model.groups.counted = False
        return None


@torch.no_grad()
def check_counts_unused(
    program: ExportedProgram, model: SelectedOutput, inputs: Sequence[Tensor]
) -> None:
    """Raise if a graph depends on a number of rows that Python has read, as on a size."""
    output, expected = program.module()(*inputs)[0], model.select(inputs)[0]
    if not torch.allclose(output, expected, rtol=0.01, atol=0.01 * float(expected.abs().amax())):
        raise CaptureError("a number of rows is used as a size")


def export_with_strategy(
    model: SelectedOutput, strategy: ExportStrategy, trace: Trace
) -> ExportedProgram:
    """Export with one strategy, and decompose composite operations."""
    # Contiguous clones, because export specialises on other strides.
    examples = tuple(x.contiguous().clone() for x in trace.inputs)
    # The batch dimension of a single row cannot be symbolic.
    dims = tuple({0: Dim.AUTO} if strategy.symbolic and len(x) > 1 else None for x in examples)
    export_function = export_after_autocast if strategy.cast else torch.export.export
    model.trace, trace.recorder = trace if strategy.reads else None, None
    with warnings.catch_warnings(), silence_torch(), torch.no_grad():
        warnings.simplefilter("ignore")
        with export_workarounds(model, strategy.strict):
            program = export_function(
                model, examples, dynamic_shapes=(dims,), strict=strategy.strict
            )
            check_constants(program)
            program = functionalize(program)
    # Export leaves reference cycles, which keep the model and the tensors of our callers alive.
    gc.collect()
    return program


def check_constants(program: ExportedProgram) -> None:
    """Raise if a constant has no values, because NumPy was called with a tensor of the trace."""
    if any(map(is_fake, program.constants.values())):
        raise DataDependentError(".numpy() is not supported")


@contextmanager
def silence_torch() -> Iterator[None]:
    """Drop the warnings and errors that torch logs in this thread.

    They repeat errors that we raise ourselves or avoid by another strategy. What a user requests
    with ``TORCH_LOGS`` is below the level of a warning, and is printed.
    """
    thread = threading.get_ident()

    def admits(record: logging.LogRecord) -> bool:
        return threading.get_ident() != thread or record.levelno < logging.WARNING

    loggers = dict(logging.root.manager.loggerDict)
    handlers = {
        handler
        for name, log in loggers.items()
        if name.partition(".")[0] == "torch" and isinstance(log, logging.Logger)
        for handler in log.handlers
    }
    for handler in handlers:
        handler.addFilter(admits)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(admits)
