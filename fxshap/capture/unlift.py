"""From an exported program to a graph module of its own, with the weights as attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from fxshap._compat import is_size_constraint
from fxshap.capture.captured import Captured
from fxshap.capture.guards import Guards
from fxshap.capture.readings import Reading
from fxshap.capture.sparse import is_dense_form
from fxshap.errors import CaptureError
from fxshap.graph.dataflow import explained_inputs, subgraph, value_dependents
from fxshap.graph.nodes import has_tensor, tensor_at
from fxshap.graph.provenance import source_line

#: States a bound of a size that torch does not know. An empty group breaks the bound.
ASSERTION = torch.ops.aten._assert_scalar.default


def unlift(
    program: ExportedProgram, model: nn.Module, explained: int, readings: Sequence[Reading] = ()
) -> Captured:
    """Return an exported program as a graph module whose weights are attributes, not inputs.

    Parameters
    ----------
    program : ExportedProgram
        Its last results are what Python has read.
    model : nn.Module
    explained : int
        How many of the inputs are explained.
    readings : sequence of Reading
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    root: dict[str, Any] = {}
    weights: dict[str, str] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    inputs: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and specs[node.name].kind is not InputKind.USER_INPUT:
            root[node.name] = weight_of(program, specs[node.name])
            copies[node] = graph.get_attr(node.name)
            copies[node].meta = dict(node.meta)
            path = str(specs[node.name].target).removeprefix("model.")
            # The others are constants that `forward` creates, or dense forms of sparse ones.
            if has_tensor(model, path) and not is_dense_form(tensor_at(model, path)):
                weights[node.name] = path
        elif node.op != "output" and not is_size_constraint(node) and node.target is not ASSERTION:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "placeholder":
                copies[node].meta["bound"] = len(inputs) >= explained
                inputs.append(node)
    returned = returned_nodes(program, program.graph.output_node())
    result, *others = (copies[node] for node in returned)
    recorded, read = others[: len(others) - len(readings)], others[len(others) - len(readings) :]
    # What does not reach the result does not matter: random numbers, unknown operators.
    needed = subgraph(graph, (result, tuple(recorded)) if recorded else result)
    check_no_higher_order_ops(needed)
    rows = fixed_rows([returned[0], *inputs])
    module = fx.GraphModule(root, needed, "Captured")
    guards, varying = split_readings(graph, root, weights, readings, read)
    return Captured(module, weights, rows, explained, guards, varying)


def split_readings(
    graph: fx.Graph,
    root: dict[str, Any],
    weights: dict[str, str],
    readings: Sequence[Reading],
    nodes: Sequence[fx.Node],
) -> tuple[Guards, tuple[Reading, ...]]:
    """Split readings into guards, and those that depend on the explained inputs."""
    dependents = value_dependents(graph, explained_inputs(graph))
    varies = [
        reading.varying or node in dependents for reading, node in zip(readings, nodes, strict=True)
    ]
    constant = {node: None for node, varying in zip(nodes, varies, strict=True) if not varying}
    guards = fx.GraphModule(root, subgraph(graph, tuple(constant)), "Guards")
    varying = (reading for reading, varying in zip(readings, varies, strict=True) if varying)
    return Guards(guards, weights), tuple(varying)


def check_no_higher_order_ops(graph: fx.Graph) -> None:
    """Raise a CaptureError at an operator that takes functions, such as ``torch.cond``."""
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise CaptureError(
                f"the model cannot be captured as one graph: at {source_line(node)}, it passes "
                f"functions to {node.target.name()}; compute all branches and choose with "
                "torch.where, and compute attention with F.scaled_dot_product_attention and a mask"
            )


def returned_nodes(program: ExportedProgram, output: fx.Node) -> list[fx.Node]:
    """Return the nodes that the model returned, without the updates of buffers."""
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    returned: Any = output.args[0]
    pairs = zip(returned, kinds, strict=True)
    return [node for node, kind in pairs if kind is OutputKind.USER_OUTPUT]


def weight_of(program: ExportedProgram, spec: InputSpec) -> Any:
    """Return a parameter, buffer or constant of an exported program, sharing its storage."""
    name = str(spec.target)
    tensors: Any = program.constants if name in program.constants else program.state_dict
    weight = tensors[name]
    # A constant may also be a generator of random numbers, which a later pass rejects by name.
    return weight.detach() if isinstance(weight, Tensor) else weight


def fixed_rows(nodes: Sequence[fx.Node]) -> int | None:
    """Return the number of rows if it is fixed for any of these nodes, or ``None``."""
    sizes = [node.meta["val"].shape[0] for node in nodes]
    return next((int(size) for size in sizes if is_fixed(size)), None)


def is_fixed(size: int | torch.SymInt) -> bool:
    """Return True if a size is one number, as export may find only after tracing."""
    return isinstance(size, int) or size.node.maybe_as_int() is not None
