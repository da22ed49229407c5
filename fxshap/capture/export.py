"""Capture: from an ``nn.Module`` and its inputs to one functional ATen graph.

``torch.export`` runs the model under a tracer at the dispatcher, so it sees through any Python, and
returns a graph without in-place operations or module calls, with a symbolic batch dimension. The
weights stay where they are: the graph holds views of the model's own storage.
"""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.export import Dim, ExportedProgram, _trace
from torch.export.graph_signature import InputKind, OutputKind

from fxshap.capture.captured import Captured
from fxshap.capture.diagnostics import (
    DECISION,
    convert_data_dependent_errors,
    exception_chain,
    explain_failure,
    first_line,
)
from fxshap.capture.functionalize import functionalize
from fxshap.capture.tracing import RecordBatchNorms, trace_scripted_modules
from fxshap.errors import CaptureError, FxshapError
from fxshap.frontend.hook_point import HookPoint, record_tensors, single_call
from fxshap.frontend.outputs import Selector, select_output
from fxshap.graph.nodes import has_tensor
from fxshap.graph.provenance import source_line

logger = logging.getLogger("fxshap")


#: How tensors are given to a model.
ModelCall = Callable[[nn.Module, Sequence[Tensor]], Any]


def call_positionally(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Call a model with tensors and nothing else."""
    return model(*inputs)


class _SelectedOutput(nn.Module):
    """The user's model, returning only the tensor to explain, and what passes a place in it."""

    def __init__(
        self, model: nn.Module, output: Selector, call: ModelCall, place: HookPoint | None
    ) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.call = call
        self.place = place

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        with (
            RecordBatchNorms(),
            trace_scripted_modules(self.model),
            convert_data_dependent_errors(),
        ):
            if self.place is None:
                return select_output(self.call(self.model, inputs), self.output)
            with record_tensors(self.model, self.place) as seen:
                result = select_output(self.call(self.model, inputs), self.output)
            return result, single_call(self.place, seen)


def capture(
    model: nn.Module,
    inputs: Sequence[Tensor],
    output: Selector = None,
    explained: int | None = None,
    call: ModelCall = call_positionally,
    place: HookPoint | None = None,
) -> Captured:
    """Capture `model` as a functional ATen graph.

    Parameters
    ----------
    model : nn.Module
        The user's model, in the mode to capture; it is not changed.
    inputs : sequence of Tensor
        Example inputs with the batch first; their values do not matter. A model that fixes its
        number of rows in Python, as ``len(x)`` does, is captured for as many rows as these have.
    output : str, int, callable or None
        Which output to explain.
    explained : int, optional
        How many of the inputs, the first ones, are explained, by default all; the others are the
        same for sample and reference.
    call : callable
        ``call(model, inputs)`` gives the inputs to the model.
    place : Place, optional
        A place in the model; the graph then returns ``(output, (tensors that pass there))``.

    Returns
    -------
    Captured

    Raises
    ------
    CaptureError
        If the model cannot be captured, naming the user's line.
    OutputError
        If the output is not a floating-point tensor.
    """
    check_not_quantized(model)
    start = time.perf_counter()
    selected = _SelectedOutput(model, output, call, place)
    count = len(inputs) if explained is None else explained
    captured = unlift(export(selected, [with_two_rows(x.detach()) for x in inputs]), model, count)
    if captured.rows not in (None, len(inputs[0])):
        captured = unlift(export(selected, [x.detach() for x in inputs]), model, count)
    seconds, nodes = time.perf_counter() - start, len(captured.module.graph.nodes)
    rows = "any number of" if captured.rows is None else captured.rows
    logger.debug(
        "captured %s for %s rows: %d nodes in %.1f s", type(model).__name__, rows, nodes, seconds
    )
    return captured


def check_not_quantized(model: nn.Module) -> None:
    """Raise if a module keeps its weights quantized, in a form that has no derivative."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.") and hasattr(module, "_packed_params"):
            raise CaptureError(
                f"{name or 'the model'} is a {type(module).__module__}.{type(module).__name__}, "
                "whose quantized weights have no derivative; explain the model as it was before "
                "quantize_dynamic or convert"
            )


def with_two_rows(x: Tensor) -> Tensor:
    """Return the first two rows, or the only row twice: a single row would be specialised on."""
    return x[:2] if len(x) > 1 else torch.cat([x, x])


@dataclass(frozen=True)
class ExportStrategy:
    """A way to export.

    Attributes
    ----------
    strict : bool
        Whether the model's Python is interpreted, not run; NumPy code is seen through only then.
    symbolic : bool
        Whether the graph is for any number of rows.
    cast : bool
        Whether what autocast does is recorded operation by operation. Otherwise its region is
        recorded, in which torch cannot take all operations apart.
    """

    strict: bool = False
    symbolic: bool = True
    cast: bool = False


#: The logger that prints a traceback where an operation does not fit its inputs.
TORCH_LOGGER = "torch._subclasses.fake_tensor"

#: torch.export below the level at which autocast acts, for which there is no public name.
export_cast = partial(_trace._export, pre_dispatch=False)

#: In this order. Running the model's Python is quickest and takes the most models.
EXPORT_STRATEGIES = (
    ExportStrategy(),
    ExportStrategy(cast=True),
    ExportStrategy(strict=True),
    ExportStrategy(symbolic=False),
)


def export(model: _SelectedOutput, inputs: Sequence[Tensor]) -> ExportedProgram:
    """Export in the first way that works and decompose the composite operations."""
    # Contiguous clones: other strides would be specialised on.
    examples = tuple(x.contiguous().clone() for x in inputs)
    failures: list[Exception] = []
    for attempt in EXPORT_STRATEGIES:
        try:
            return export_with_strategies(model, examples, attempt)
        except FxshapError:
            raise
        except Exception as error:
            failures.append(error)
        logger.debug("not captured (%s): %s", attempt, first_line(failures[-1]))
        if len(failures) == 1:
            # Where the model itself fails on these inputs, its own error says more than ours.
            with torch.no_grad():
                model(*examples)
        if any(type(cause).__name__ == DECISION for cause in exception_chain(failures[-1])):
            break
    raise CaptureError(explain_failure(failures[0])) from failures[0]


@contextmanager
def silence_torch_log(name: str) -> Iterator[None]:
    """Let a logger say nothing of what we raise ourselves or try in another way."""
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def export_with_strategies(
    model: _SelectedOutput, examples: tuple[Tensor, ...], how: ExportStrategy
) -> ExportedProgram:
    """Export and decompose."""
    # A single row has nothing symbolic about it.
    rows = tuple({0: Dim.AUTO} if how.symbolic and len(x) > 1 else None for x in examples)
    with warnings.catch_warnings(), silence_torch_log(TORCH_LOGGER), torch.no_grad():
        warnings.simplefilter("ignore")
        program = (export_cast if how.cast else torch.export.export)(
            model, examples, dynamic_shapes=(rows,), strict=how.strict
        )
        program = functionalize(program)
    # What export leaves behind in cycles holds on to the model and to our callers' tensors.
    gc.collect()
    return program


def check_no_higher_order_ops(graph: fx.Graph) -> None:
    """Raise at an operator that takes functions, as `torch.cond` does, which are no operations."""
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise CaptureError(
                f"the model cannot be captured as one graph: at {source_line(node)}, it gives "
                f"functions to {node.target.name()}; compute all branches and choose with "
                "torch.where, and attention with F.scaled_dot_product_attention and a mask"
            )


def unlift(program: ExportedProgram, model: nn.Module, explained: int) -> Captured:
    """Turn an exported program's weight inputs into attributes and keep what was returned."""
    check_no_higher_order_ops(program.graph)
    signature = program.graph_signature
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    tensors: dict[str, Tensor] = {}
    weights: dict[str, str] = {}
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    outputs = [spec.kind for spec in signature.output_specs]
    inputs: list[int | torch.SymInt] = []  # sizes of the batch
    sizes: list[int | torch.SymInt] = []

    for node in program.graph.nodes:
        if node.op == "placeholder" and kinds[node.name].kind is not InputKind.USER_INPUT:
            target = str(kinds[node.name].target)
            tensors[node.name] = weight_of(program, kinds[node.name].kind, target)
            values[node] = graph.get_attr(node.name)
            values[node].meta = dict(node.meta)
            path = target.removeprefix("model.")
            if has_tensor(model, path):  # the others are constants made in `forward`
                weights[node.name] = path
        elif node.op == "output":
            returned = zip(node.args[0], outputs, strict=True)
            result, *passing = [n for n, kind in returned if kind is OutputKind.USER_OUTPUT]
            kept = tuple(values[n] for n in passing)
            graph.output((values[result], kept) if kept else values[result])
            sizes.append(result.meta["val"].shape[0])
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            if node.op == "placeholder":
                values[node].meta["bound"] = len(inputs) >= explained
                inputs.append(node.meta["val"].shape[0])
    graph.eliminate_dead_code()
    sizes += inputs
    rows = next((int(size) for size in sizes if is_fixed(size)), None)
    root: dict[str, Any] = dict(tensors)
    return Captured(fx.GraphModule(root, graph, "Captured"), weights, rows, explained)


def is_fixed(size: int | torch.SymInt) -> bool:
    """Say whether a size is one number, which export may have found out late."""
    return isinstance(size, int) or size.node.maybe_as_int() is not None


def weight_of(program: ExportedProgram, kind: InputKind, target: str) -> Tensor:
    """Return a parameter, buffer or constant of an exported program, sharing its storage."""
    found = program.constants if target in program.constants else program.state_dict
    weight: Tensor = found[target]
    return weight.detach()


# --- what to say when it fails ------------------------------------------------------------------
