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
from fxshap.errors import CaptureError
from fxshap.graph.nodes import has_tensor
from fxshap.graph.provenance import source_line

#: States a bound of a size that torch does not know. An empty group breaks the bound.
ASSERTION = torch.ops.aten._assert_scalar.default


def unlift(program: ExportedProgram, model: nn.Module, explained: int) -> Captured:
    """Return an exported program as a graph module whose weights are attributes, not inputs."""
    check_no_higher_order_ops(program.graph)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    root: dict[str, Any] = {}
    weights: dict[str, str] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    inputs: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.op == "output":
            result, *recorded = returned_nodes(program, node)
            values = tuple(copies[n] for n in recorded)
            graph.output((copies[result], values) if values else copies[result])
        elif node.op == "placeholder" and specs[node.name].kind is not InputKind.USER_INPUT:
            root[node.name] = weight_of(program, specs[node.name])
            copies[node] = graph.get_attr(node.name)
            copies[node].meta = dict(node.meta)
            path = str(specs[node.name].target).removeprefix("model.")
            if has_tensor(model, path):  # the others are constants that `forward` creates
                weights[node.name] = path
        elif not is_size_constraint(node) and node.target is not ASSERTION:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "placeholder":
                copies[node].meta["bound"] = len(inputs) >= explained
                inputs.append(node)
    graph.eliminate_dead_code()
    rows = fixed_rows([result, *inputs])
    return Captured(fx.GraphModule(root, graph, "Captured"), weights, rows, explained)


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
