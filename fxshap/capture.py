"""Capture: from an ``nn.Module`` and its inputs to one functional ATen graph.

``torch.export`` runs the model under a tracer at the dispatcher, so it sees through any Python, and
returns a graph without in-place operations or module calls, with a symbolic batch dimension. The
weights stay where they are: the graph holds views of the model's own storage.
"""

from __future__ import annotations

import gc
import re
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

import fxshap
from fxshap.batch_norm import OneBatchNorm
from fxshap.errors import CaptureError, FxshapError
from fxshap.functional import functional
from fxshap.output import Selector, select_output


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    Attributes
    ----------
    module : fx.GraphModule
        Placeholders are the model's inputs, ``get_attr`` nodes its weights.
    weights : dict of str to str
        For each weight of the graph, its qualified name in the user's model.
    rows : int or None
        The only number of rows the graph runs on; ``None`` if any will do.
    """

    module: fx.GraphModule
    weights: dict[str, str]
    rows: int | None


class _Selected(nn.Module):
    """The user's model, returning only the tensor to explain."""

    def __init__(self, model: nn.Module, output: Selector) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, *inputs: Tensor) -> Tensor:
        with OneBatchNorm():
            return select_output(self.model(*inputs), self.output)


def capture(model: nn.Module, inputs: Sequence[Tensor], output: Selector = None) -> Captured:
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

    Returns
    -------
    Captured

    Raises
    ------
    CaptureError
        If the model cannot be captured, naming the user's line.
    OutputError
        If the output is not a 2-d floating-point tensor.
    """
    selected = _Selected(model, output)
    captured = unlift(export(selected, [two_rows(x.detach()) for x in inputs]), model)
    if captured.rows not in (None, len(inputs[0])):
        captured = unlift(export(selected, [x.detach() for x in inputs]), model)
    return captured


def two_rows(x: Tensor) -> Tensor:
    """Return the first two rows, or the only row twice: a single row would be specialised on."""
    return x[:2] if len(x) > 1 else torch.cat([x, x])


def export(model: _Selected, inputs: Sequence[Tensor]) -> ExportedProgram:
    """Export with a symbolic batch dimension and decompose the composite operations."""
    # Contiguous clones: other strides would be specialised on.
    examples = tuple(x.contiguous().clone() for x in inputs)
    # A single row has nothing symbolic about it.
    batch = (tuple({0: Dim.AUTO} if len(x) > 1 else None for x in examples),)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, examples, dynamic_shapes=batch, strict=False)
            program = functional(program)
        # What export leaves behind in cycles holds on to the model and to our callers' tensors.
        gc.collect()
        return program
    except FxshapError:
        raise
    except Exception as error:
        # Where the model itself fails on these inputs, its own error says more than ours.
        with torch.no_grad():
            model(*examples)
        raise CaptureError(explain_failure(error)) from error


def unlift(program: ExportedProgram, model: nn.Module) -> Captured:
    """Turn an exported program's weight inputs into attributes and keep one output."""
    signature = program.graph_signature
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    tensors: dict[str, Tensor] = {}
    weights: dict[str, str] = {}
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
    outputs = [spec.kind for spec in signature.output_specs]
    sizes: list[int | torch.SymInt] = []  # of the batch, at the inputs and the output

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
            explained = node.args[0][outputs.index(OutputKind.USER_OUTPUT)]
            graph.output(values[explained])
            sizes.append(explained.meta["val"].shape[0])
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            if node.op == "placeholder":
                sizes.append(node.meta["val"].shape[0])
    graph.eliminate_dead_code()
    rows = next((size for size in sizes if isinstance(size, int)), None)
    root: dict[str, Any] = dict(tensors)
    return Captured(fx.GraphModule(root, graph, "Captured"), weights, rows)


def weight_of(program: ExportedProgram, kind: InputKind, target: str) -> Tensor:
    """Return a parameter, buffer or constant of an exported program, sharing its storage."""
    found = program.constants if target in program.constants else program.state_dict
    weight: Tensor = found[target]
    return weight.detach()


def has_tensor(model: nn.Module, path: str) -> bool:
    """Say whether a model has a tensor, registered or not, at a dotted path."""
    try:
        return isinstance(tensor_at(model, path), Tensor)
    except AttributeError:
        return False


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """Return the parameter, buffer or other tensor at a dotted path below a model."""
    owner, _, leaf = path.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor


def user_module(node: fx.Node) -> str:
    """Return the qualified name of the user's module that a node came from; '' for the model."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0].removeprefix("model").removeprefix(".") if stack else ""


def node_line(node: fx.Node) -> str:
    """Return the user's line that a node came from: ``file:line (`code`)``."""
    lines = re.findall(r'File "(.+?)", line (\d+), in .*\n\s*(.*)', node.stack_trace or "")
    found = [(file, int(line), code) for file, line, code in lines if is_users(file)]
    return "{}:{} (`{}`)".format(*found[-1]) if found else "an unknown line"


# --- what to say when it fails ------------------------------------------------------------------

REMEDIES = {
    "GuardOnDataDependentSymNode": (
        "it decides by the value of a tensor (an `if`, a loop or `.item()`), so no single graph "
        "describes it; choose with torch.where, or explain the part after the decision"
    ),
}


def explain_failure(error: BaseException) -> str:
    """Say which of the user's lines cannot be captured, why, and what to do."""
    where = user_line(error.__traceback__)
    kinds = {type(cause).__name__ for cause in chain(error)}
    remedy = next(
        (text for kind, text in REMEDIES.items() if kind in kinds),
        f"torch.export says: {first_line(error)}",
    )
    return f"the model cannot be captured as one graph: at {where}, {remedy}"


def chain(error: BaseException | None) -> list[BaseException]:
    """Return an exception and its causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def first_line(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def is_users(file: str) -> bool:
    """Say whether a source file is the user's, and not of torch, fxshap or Python."""
    ours = [str(Path(module.__file__ or "").parent) for module in (torch, fxshap)]
    return not file.startswith((*ours, "<")) and "contextlib" not in file


def user_line(trace: TracebackType | None) -> str:
    """Return the innermost of the user's lines in a traceback: ``file:line (`code`)``."""
    frames = [frame for frame in traceback.extract_tb(trace) if is_users(frame.filename)]
    if not frames:
        return "an unknown line"
    return f"{frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)"
