"""Rewrite: from one captured graph to two, `observe` and `attribute`.

- ``observe(*inputs) -> (output, taps)`` is the captured graph, returning as well what every
  nonlinear node that depends on the input receives (its *taps*).
- ``attribute(ends, *inputs) -> output`` is the captured graph in which every such node is a
  :func:`fxshap.autograd.rescale.rescale`.

Nodes that are linear in what depends on the input stay themselves: autograd is right for them.
Each pass is a function from graph to graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from fxshap.autograd.rescale import RESCALES, rescale
from fxshap.capture.export import Captured, node_line, user_module
from fxshap.errors import CaptureError
from fxshap.graph.insertion import sources_of
from fxshap.graph.nodes import (
    batch_dims,
    calls,
    is_rescaled,
    needs_rule,
    packet,
    stands_for,
    varying_arguments,
    varying_places,
    whereabouts,
)
from fxshap.ops.frozen import CONVOLUTIONS, lean_batch_norm, lean_convolution
from fxshap.passes.batch_norm import BATCH_NORM, one_batch_norm
from fxshap.passes.densify_masks import READS, compute_everywhere
from fxshap.passes.duplicate_writes import assign_once
from fxshap.passes.promote_float64 import narrowest, widen
from fxshap.passes.propagate_variances import lead_variances, measure_variances, restore_activations
from fxshap.passes.relax_booleans import booleans_to_floats
from fxshap.rules.core.registry import find_rule

aten = torch.ops.aten

#: Identities in a functional graph.
IDENTITIES = (aten.clone, aten.alias, aten.detach, aten.lift_fresh_copy, aten.contiguous)
#: Views need matching strides, and a rule may return others.
RESHAPES = (aten.view, aten._unsafe_view)


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
        The attributes of the other graphs that hold what `constants` returns.
    variances : fx.GraphModule
        ``variances(reference, sample, *inputs)`` returns, for the taps of both ends, the variances
        that activations receive; ``None`` where none does.
    variance_taps : tuple of str
        Their names.
    packed : fx.GraphModule
        The captured graph, where what it computes where a mask holds is now computed everywhere;
        ``None`` where it does nothing of the kind.
    computed_in : torch.dtype
        The type with the fewest digits in which the model computes what depends on its input.
    """

    observe: fx.GraphModule
    attribute: fx.GraphModule
    taps: tuple[str, ...]
    constants: fx.GraphModule
    folded: tuple[str, ...]
    variances: fx.GraphModule | None
    variance_taps: tuple[str, ...]
    packed: fx.GraphModule | None
    computed_in: torch.dtype

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Point all graphs at these weights and compute the constants anew."""
        folded = [g for g in (self.observe, self.attribute, self.variances) if g is not None]
        others = [g for g in (self.constants, self.packed) if g is not None]
        for name, weight in weights.items():
            for module in (*folded, *others):
                setattr(module, name, weight.detach())
        with torch.no_grad():
            values = self.constants()
        for name, value in zip(self.folded, values, strict=True):
            for module in folded:
                setattr(module, name, value)


def rewrite(captured: Captured, variances: bool = False) -> Rewritten:
    """Build the two graphs of a captured model.

    Parameters
    ----------
    captured : Captured
    variances : bool
        Whether activations receive the variances of the sums before them.
    """
    graph = fx.Graph()
    output = graph.graph_copy(captured.module.graph, {})
    graph.output(output)
    graph = drop_identities(graph)
    varying = dependents(graph, explained_inputs(graph))
    computed_in = narrowest(varying, input_dtype(graph))
    graph = widen(graph, varying)
    varying = dependents(graph, explained_inputs(graph))
    masked = compute_everywhere(graph, varying)
    graph = one_batch_norm(graph, varying, apart=variances)
    graph = mark_varying(sort_topk(graph))
    refuse_choices(graph)
    graph = assign_once(graph)
    graph = reshape_views(booleans_to_floats(graph, input_dtype(graph)))
    refuse_randomness(graph)
    if variances:
        graph = lead_variances(graph)

    constants, folded = fold_constants(graph)
    attribute, taps, variance_taps = insert_rescale(graph)
    observe, attribute = return_taps(graph, taps), make_lean(attribute)
    measure = None
    if variance_taps:
        observe = restore_activations(observe)
        measure = measure_variances(attribute, variance_taps)
    root = captured.module
    for name in folded:  # a place for what `bind` computes
        setattr(root, name, torch.empty(0))
    rewritten = Rewritten(
        fx.GraphModule(root, make_lean(observe), "Observe"),
        fx.GraphModule(root, attribute, "Attribute"),
        taps,
        fx.GraphModule(root, constants, "Constants"),
        folded,
        None if measure is None else fx.GraphModule(root, measure, "Variances"),
        variance_taps,
        captured.module if masked else None,
        computed_in,
    )
    rewritten.bind({})
    return rewritten


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
        if packet(node) in RESHAPES and node.target is not aten.view.dtype:
            node.target = aten.reshape.default
    return graph


def explained_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Return the inputs that differ between sample and reference."""
    return [n for n in graph.nodes if n.op == "placeholder" and not n.meta.get("bound")]


def mark_varying(graph: fx.Graph) -> fx.Graph:
    """Write into ``meta["varying"]`` whether a node's value depends on the values of the input."""
    varying = dependents(graph, explained_inputs(graph))
    for node in graph.nodes:
        node.meta["varying"] = node in varying
    return graph


def dependents(graph: fx.Graph, roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose values depend on the values of `roots`, these included."""
    found = set(roots)
    for node in graph.nodes:
        if not found.isdisjoint(sources_of(node)):
            found.add(node)
    return found


def refuse_choices(graph: fx.Graph) -> None:
    """Raise if the input's values become Python numbers or sizes, or regroup the rows."""
    fixed = sizes_of_constants(graph)
    for node in calls(graph):
        if not node.meta["varying"]:
            continue
        remedy = (
            "stay in tensors of a fixed size, for example with torch.where or a product with a mask"
        )
        if packet(node) in (aten.item, aten._local_scalar_dense):
            what = "it takes a number out of a tensor (`.item()`, `.tolist()`, `float()`)"
        elif free_unbacked_symbols(node.meta.get("val")) - fixed:
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


def sizes_of_constants(graph: fx.Graph) -> set[Any]:
    """Return the sizes that are unknown to torch but the same for every input.

    How many places a constant mask holds, for one.
    """
    found: set[Any] = set()
    for node in calls(graph):
        by_place = packet(node) in (*READS, aten.masked_select)
        sources = pytree.tree_leaves(node.args[1]) if by_place else node.all_input_nodes
        if not any(source.meta["varying"] for source in sources if isinstance(source, fx.Node)):
            found |= free_unbacked_symbols(node.meta.get("val"))
    return found


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


def insert_rescale(graph: fx.Graph) -> tuple[fx.Graph, tuple[str, ...], tuple[str, ...]]:
    """Copy a graph with every nonlinear node replaced by `rescale`.

    Also return the taps, and apart from them those that are variances.
    """
    attribute = fx.Graph()
    ends = attribute.placeholder("ends")
    copies: dict[fx.Node, fx.Node] = {}
    taps: dict[str, None] = {}
    variances: dict[str, None] = {}
    for node in graph.nodes:
        if node.op == "output":
            attribute.output(copies[node.args[0]])
        elif node.op == "call_function" and needs_rule(node):
            taken: Any = varying_places(node)
            sources = [source for _, source in varying_arguments(node)]
            for source in sources:
                (variances if source.meta.get("variance") else taps)[source.name] = None
            rows = (*(batch_dims(source)[0] for source in sources), *batch_dims(node))
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            operator = () if node.target in RESCALES else (node.target,)
            args = (ends, whereabouts(node), taken, rows, *operator, *args)
            call = RESCALES.get(node.target, rescale)
            copies[node] = stand_in(node, attribute, call, args, kwargs)
        else:
            copies[node] = attribute.node_copy(node, copies.__getitem__)
    return attribute, tuple(taps), tuple(variances)


def stand_in(
    node: fx.Node, graph: fx.Graph, target: Callable[..., Any], args: Any, kwargs: Any
) -> fx.Node:
    """Add a call to another graph, with the name and the origin of the node it stands for."""
    call = graph.create_node("call_function", target, args, kwargs, name=node.name)
    call.meta = dict(node.meta)
    return call


def make_lean(graph: fx.Graph) -> fx.Graph:
    """Let batch norms, and convolutions with constant weights, keep nothing of what they get."""
    for node in calls(graph):
        if node.target is BATCH_NORM:
            node.target = lean_batch_norm
        elif node.target in CONVOLUTIONS and [p for p, _ in varying_arguments(node)] == [0]:
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
    targets: set[Any] = {stands_for(node) for node in calls(attribute.graph) if is_rescaled(node)}
    rules = {target: find_rule(target) for target in targets}
    return sorted(str(t) for t, rule in rules.items() if rule is None or not rule.closed)
