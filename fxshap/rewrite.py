"""Rewrite: from one captured graph to two, `observe` and `attribute`.

- ``observe(*inputs) -> (output, taps)`` is the captured graph, returning as well what every
  nonlinear node that depends on the input receives (its *taps*).
- ``attribute(ends, *inputs) -> output`` is the captured graph in which every such node is a
  :func:`fxshap.rescale.rescale`.

Nodes that are linear in what depends on the input stay themselves: autograd is right for them.
Each pass is a function from graph to graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from fxshap.batch_norm import affine_batch_norms
from fxshap.booleans import booleans_to_floats
from fxshap.capture import UNKNOWN_LINE, Captured, node_line, user_module
from fxshap.errors import CaptureError
from fxshap.lean import CONVOLUTIONS, lean_convolution
from fxshap.rescale import rescale
from fxshap.rules.table import find_rule

aten = torch.ops.aten

#: Identities in a functional graph.
IDENTITIES = (aten.clone, aten.alias, aten.detach, aten.lift_fresh_copy, aten.contiguous)
#: Views need matching strides, and a rule may return others.
RESHAPES = (aten.view, aten._unsafe_view)
#: Operations that take only the shape of their arguments.
SHAPE_ONLY = (
    aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros,
    aten.new_ones, aten.new_full, aten.new_empty, aten.sym_size, aten.sym_numel, aten.size,
)  # fmt: skip


@dataclass(frozen=True)
class Rewritten:
    """The two rewritten graphs and what passes between and into them.

    Attributes
    ----------
    observe, attribute : fx.GraphModule
    taps : tuple of str
        The names of the taps, in the order `observe` returns them.
    constants : fx.GraphModule
        Computes from the weights what does not depend on the input, once for each state of them.
    folded : tuple of str
        The attributes of the two graphs that hold what `constants` returns.
    """

    observe: fx.GraphModule
    attribute: fx.GraphModule
    taps: tuple[str, ...]
    constants: fx.GraphModule
    folded: tuple[str, ...]

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Point all graphs at these weights and compute the constants anew."""
        graphs = (self.constants, self.observe, self.attribute)
        for name, weight in weights.items():
            for module in graphs:
                setattr(module, name, weight.detach())
        with torch.no_grad():
            values = self.constants()
        for name, value in zip(self.folded, values, strict=True):
            for module in graphs[1:]:
                setattr(module, name, value)


def rewrite(captured: Captured) -> Rewritten:
    """Build the two graphs of a captured model."""
    graph = fx.Graph()
    output = graph.graph_copy(captured.module.graph, {})
    graph.output(output)
    for step in (drop_identities, affine_batch_norms, sort_topk, mark_varying):
        graph = step(graph)
    refuse_choices(graph)
    graph = reshape_views(booleans_to_floats(graph, input_dtype(graph)))
    refuse_randomness(graph)

    constants, folded = fold_constants(graph)
    attribute, taps = insert_rescale(graph)
    observe = return_taps(graph, taps)
    root = captured.module
    for name in folded:  # a place for what `bind` computes
        setattr(root, name, torch.empty(0))
    rewritten = Rewritten(
        fx.GraphModule(root, make_lean(observe), "Observe"),
        fx.GraphModule(root, make_lean(attribute), "Attribute"),
        taps,
        fx.GraphModule(root, constants, "Constants"),
        folded,
    )
    rewritten.bind({})
    return rewritten


def packet(node: fx.Node) -> Any:
    """Return the operator packet of a node, such as ``aten.relu`` of ``aten.relu.default``."""
    return getattr(node.target, "overloadpacket", node.target)


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """Iterate over the operations of a graph, which may change under way."""
    return (node for node in list(graph.nodes) if node.op == "call_function")


def input_dtype(graph: fx.Graph) -> torch.dtype:
    """Return the floating-point type of the first input that has one."""
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    return next((v.dtype for v in values if v.is_floating_point()), torch.get_default_dtype())


# --- passes -------------------------------------------------------------------------------------


def drop_identities(graph: fx.Graph) -> fx.Graph:
    """Remove copies, detachments and assertions, which change nothing in a functional graph."""
    for node in calls(graph):
        if packet(node) is aten.copy:  # copy(old, new) is new in the shape and the type of old
            old, new, *_ = node.args
            node.target, node.args = aten.expand_as.default, (new, old)
        if packet(node) in IDENTITIES:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif "assert" in str(node.target) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph


def sort_topk(graph: fx.Graph) -> fx.Graph:
    """Ask every top-k for its values in order, which the rules count on, where it is left open."""
    for node in calls(graph):
        if packet(node) is aten.topk:
            node.args, node.kwargs = (
                node.args[:4],
                {k: v for k, v in node.kwargs.items() if k != "sorted"},
            )
    return graph


def reshape_views(graph: fx.Graph) -> fx.Graph:
    """Turn ``view`` into ``reshape``."""
    for node in calls(graph):
        if packet(node) in RESHAPES:
            node.target = aten.reshape.default
    return graph


def mark_varying(graph: fx.Graph) -> fx.Graph:
    """Write into ``meta["varying"]`` whether a node's value depends on the values of the input."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    varying = dependents(graph, [node for node in placeholders if not node.meta.get("bound")])
    for node in graph.nodes:
        node.meta["varying"] = node in varying
    return graph


def dependents(graph: fx.Graph, roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose values depend on the values of `roots`, these included."""
    found = set(roots)
    for node in graph.nodes:
        if packet(node) not in SHAPE_ONLY and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def refuse_choices(graph: fx.Graph) -> None:
    """Raise if the input's values become Python numbers or sizes, or regroup the rows."""
    for node in calls(graph):
        if not node.meta["varying"]:
            continue
        remedy = (
            "stay in tensors of a fixed size, for example with torch.where or a product with a mask"
        )
        if packet(node) in (aten.item, aten._local_scalar_dense):
            what = "it takes a number out of a tensor (`.item()`, `.tolist()`, `float()`)"
        elif free_unbacked_symbols(node.meta.get("val")):
            what = "the size of a tensor depends on values (as in `x[x > 0]` or `.nonzero()`)"
        elif "grouped_mm" in str(node.target):
            what = "it sorts what is in the rows of the batch into groups, by values (`grouped_mm`)"
            remedy = (
                "multiply row by row; a mixture of experts of transformers does after "
                'model.set_experts_implementation("batched_mm")'
            )
        else:
            continue
        raise CaptureError(
            f"the model cannot be captured as one graph: at {node_line(node)}, {what}; {remedy}"
        )


def refuse_randomness(graph: fx.Graph) -> None:
    """Raise if what depends on the input is mixed with random numbers."""
    for node in calls(graph):
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and find_rule(node.target) is None:
            raise CaptureError(
                f"the model draws random numbers in {user_module(node) or 'its forward'}, at "
                f"{node_line(node)} ({node.target}), so it has no single output to explain; call "
                "model.eval(), or turn the sampling off"
            )


def fold_constants(graph: fx.Graph) -> tuple[fx.Graph, tuple[str, ...]]:
    """Take what depends on weights alone out of a graph.

    In place, the results that the rest of the graph uses become attributes; returned are a graph
    that computes them and the names of the attributes.
    """
    constant: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and all(n in constant for n in node.all_input_nodes)
        ):
            constant[node] = None
    used = [
        node
        for node in constant
        if node.op == "call_function"
        and isinstance(node.meta.get("val"), Tensor)
        and any(user not in constant for user in node.users)
    ]
    constants = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in constant:
        copies[node] = constants.node_copy(node, copies.__getitem__)
    constants.output(tuple(copies[node] for node in used))
    constants.eliminate_dead_code()
    for node in used:
        with graph.inserting_before(node):
            held = graph.create_node("get_attr", f"folded_{node.name}")
        held.meta = {**node.meta, "varying": False}
        node.replace_all_uses_with(held, delete_user_cb=lambda user: user not in constant)
    graph.eliminate_dead_code()
    return constants, tuple(f"folded_{node.name}" for node in used)


def insert_rescale(graph: fx.Graph) -> tuple[fx.Graph, tuple[str, ...]]:
    """Copy a graph with every nonlinear node replaced by `rescale`; also return the taps."""
    attribute = fx.Graph()
    ends = attribute.placeholder("ends")
    copies: dict[fx.Node, fx.Node] = {}
    taps: dict[str, None] = {}
    for node in graph.nodes:
        if node.op == "output":
            attribute.output(copies[node.args[0]])
        elif node.op == "call_function" and needs_rule(node):
            taken: Any = varying_places(node)
            taps.update(dict.fromkeys(taken.values()))
            sources = [source for _, source in varying_arguments(node)]
            rows = (*(batch_dims(source)[0] for source in sources), *batch_dims(node))
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            args = (ends, whereabouts(node), taken, rows, node.target, *args)
            copies[node] = stand_in(node, attribute, rescale, args, kwargs)
        else:
            copies[node] = attribute.node_copy(node, copies.__getitem__)
    return attribute, tuple(taps)


def stand_in(
    node: fx.Node, graph: fx.Graph, target: Callable[..., Any], args: Any, kwargs: Any
) -> fx.Node:
    """Add a call to another graph, with the name and the origin of the node it stands for."""
    call = graph.create_node("call_function", target, args, kwargs, name=node.name)
    call.meta = dict(node.meta)
    return call


def make_lean(graph: fx.Graph) -> fx.Graph:
    """Replace convolutions with constant weights, which stay linear, by lean ones."""
    for node in calls(graph):
        if node.target in CONVOLUTIONS and [p for p, _ in varying_arguments(node)] == [0]:
            node.args = (CONVOLUTIONS[node.target], *node.args)
            node.target = lean_convolution
    return graph


def return_taps(graph: fx.Graph, taps: tuple[str, ...]) -> fx.Graph:
    """Copy a graph, returning the output and the tapped values."""
    observe = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = observe.graph_copy(graph, copies)
    named = {node.name: copy for node, copy in copies.items()}
    observe.output((output, tuple(named[tap] for tap in taps)))
    return observe


def generic_operations(attribute: fx.GraphModule) -> list[str]:
    """Return the names of the operations that take the generic rule in a rewritten graph."""
    targets: set[Any] = {node.args[4] for node in calls(attribute.graph) if node.target is rescale}
    rules = {target: find_rule(target) for target in targets}
    return sorted(str(t) for t, rule in rules.items() if rule is None or not rule.closed)


# --- what a node is -----------------------------------------------------------------------------


def stands_for(node: fx.Node) -> Any:
    """Return the operator that a node of the rewritten graphs is, or stands for."""
    if node.target is rescale:
        return node.args[4]
    if node.target is lean_convolution:
        return next(op for op, dims in CONVOLUTIONS.items() if dims == node.args[0])
    return node.target


def needs_rule(node: fx.Node) -> bool:
    """Say whether a node is nonlinear in what depends on the input, and has a gradient to give."""
    if not node.meta["varying"] or node.target is operator.getitem or not gives_floats(node):
        return False
    rule = find_rule(node.target)
    varying = varying_arguments(node)
    # What makes floats of nothing but integers or booleans has no derivative to be linear with.
    jumps = not any(gives_floats(source) for _, source in varying)
    return jumps or rule is None or not rule.is_linear({place for place, _ in varying})


def whereabouts(node: fx.Node) -> str:
    """Name a node and the user's module and line that it came from, for messages."""
    module, line = user_module(node), node_line(node)
    place = f"{node.name} in {module}" if module else node.name
    return place if line == UNKNOWN_LINE else f"{place}, {line.partition(' (')[0]}"


def gives_floats(node: fx.Node) -> bool:
    """Say whether any output of a node is floating point."""
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(v, Tensor) and v.is_floating_point() or is_complex(v) for v in values)


def is_complex(value: Any) -> bool:
    """Say whether a value is a complex tensor."""
    return isinstance(value, Tensor) and value.is_complex()


def varying_arguments(node: fx.Node) -> list[tuple[int, fx.Node]]:
    """Return (argument position, node) for every argument that depends on the input."""
    found = [(place, n) for place, arg in enumerate(node.args) for n in nodes_in(arg)]
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    found += [(names.index(key), n) for key, arg in node.kwargs.items() for n in nodes_in(arg)]
    return [(place, n) for place, n in found if n.meta["varying"]]


def nodes_in(argument: Any) -> list[fx.Node]:
    """Return the nodes in an argument, which may be a list."""
    return [leaf for leaf in pytree.tree_leaves(argument) if isinstance(leaf, fx.Node)]


def varying_places(node: fx.Node) -> dict[int, str]:
    """Return {place among the flattened arguments: tap} of what depends on the input."""
    flat = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return {
        place: leaf.name
        for place, leaf in enumerate(flat)
        if isinstance(leaf, fx.Node) and leaf.meta["varying"]
    }


def batch_dims(node: fx.Node) -> tuple[int, ...]:
    """Return the dimension of each output of a node that grows with the batch; 0 if unknown."""
    return tuple(
        next((d for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt)), 0)
        for value in pytree.tree_leaves(node.meta["val"])
        if isinstance(value, Tensor)
    )
