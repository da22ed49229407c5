"""From an exported graph to a functional one, in which no operation changes a tensor in place.

``torch.export`` records ``x.relu_()`` as it is. ``ExportedProgram.run_decompositions`` makes a
graph functional by tracing it twice more, which takes three times as long as the export. Nearly
all models need much less. An in-place operation is replaced by its functional form, and later uses
of the tensor by the result. This is correct if no view of the tensor is used afterwards. Where one
is, or where torch would decompose an operation, ``run_decompositions`` does everything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxshap._compat import replace_positions, replace_views
from fxshap.graph.insertion import inline_graph, trace_function
from fxshap.graph.nodes import output_tensors
from fxshap.rules.core.registry import DECOMPOSITIONS, find_rule

aten = torch.ops.aten
KEYS = torch._C.DispatchKey

#: Operations that return their input in evaluation mode.
DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)

#: The position of their argument ``train``.
TRAIN = 2

#: Operations that return a number, and whose answer the trace has taken.
NUMBERS = (
    aten.item.default,
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.allclose.default,
)

#: Composite operations that torch does not decompose, because a symbolic size has no parts.
SIZES = (aten.sym_size.int,)


def functionalize(program: ExportedProgram) -> ExportedProgram:
    """Return a functional form of an exported program, with composite operations decomposed.

    Parameters
    ----------
    program : ExportedProgram
        As ``torch.export.export`` returns it. It may be changed.
    """
    remove_unused(program.graph)
    replace_views(program.graph)
    replace_positions(program.graph)
    forms = functional_forms(program.graph)
    if forms is None:
        decomposed: ExportedProgram = program.run_decompositions(dict(DECOMPOSITIONS))
        return decomposed
    apply_functional_ops(program.graph, forms)
    for node in program.graph.nodes:
        if node.target in DROPOUTS:
            node.target, node.args = aten.alias.default, node.args[:1]
    traced: dict[Any, fx.Graph] = {}
    for node in list(program.graph.nodes):
        if node.target in DECOMPOSITIONS:
            decompose(node, DECOMPOSITIONS[node.target], traced)
    return program


def remove_unused(graph: fx.Graph) -> None:
    """Remove calls whose tensors or numbers are not used, and which change none.

    ``Graph.eliminate_dead_code`` leaves random numbers.
    """
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and is_functional_call(node):
            schema = getattr(node.target, "_schema", None)
            if not output_tensors(node) and node.target not in NUMBERS:
                continue  # an assertion, or a context
            if schema is None or not schema.is_mutable:
                graph.erase_node(node)


def is_preserved(node: fx.Node, target: Any) -> bool:
    """Return True if a node may call this target in the result.

    Other targets change a tensor, or torch decomposes them.
    """
    if not isinstance(target, OpOverload):  # arithmetic of sizes; the rest are of higher order
        return getattr(target, "__module__", "") in ("_operator", "math", "torch")
    if target in DROPOUTS:
        return not node.args[TRAIN]
    if target in SIZES or target in DECOMPOSITIONS or find_rule(target) is not None:
        return True
    composite = target.has_kernel_for_dispatch_key(KEYS.CompositeImplicitAutograd)
    return not (target._schema.is_mutable or composite or KEYS.Autograd in target.py_kernels)


# --- in-place operations ------------------------------------------------------------------------


def functional_forms(graph: fx.Graph) -> dict[fx.Node, OpOverload] | None:
    """Return the functional form of every in-place operation.

    ``None`` if the graph needs ``run_decompositions``.
    """
    if not all(is_preserved(n, n.target) for n in graph.nodes if is_functional_call(n)):
        return None
    if graph.find_nodes(op="get_attr"):
        return None
    same = same_tensors(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    aliases: dict[int, list[fx.Node]] = defaultdict(list)  # earlier nodes, by their storage
    forms: dict[fx.Node, OpOverload] = {}
    cache: dict[Any, OpOverload | None] = {}
    for node in graph.nodes:
        if is_in_place(node):
            changed = node.args[0]
            form = functional_form(node, cache)
            views = [n for s in storages(changed) for n in aliases[s] if same[n] != same[changed]]
            used_later = any(order[user] > order[node] for n in views for user in n.users)
            if form is None or used_later or not is_preserved(node, form):
                return None
            forms[node] = form
        for storage in storages(node):
            aliases[storage].append(node)
    return forms


def is_in_place(node: fx.Node) -> bool:
    """Return True if a node changes its first argument, and no other, and returns it."""
    schema = getattr(node.target, "_schema", None)
    return (
        schema is not None
        and schema.name.startswith("aten::")
        and schema.name.endswith("_")
        and schema.is_mutable
        and isinstance(node.args[0], fx.Node)
    )


def is_functional_call(node: fx.Node) -> bool:
    """Return True if a node calls an operator that is not in place."""
    return node.op == "call_function" and not is_in_place(node)


def same_tensors(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return for every node the first node that is the same tensor, changed since or not."""
    same: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        same[node] = same[node.args[0]] if is_in_place(node) else node
    return same


def storages(node: fx.Node) -> set[int]:
    """Return the identities of the memory that a node's tensors use."""
    values = pytree.tree_leaves(node.meta.get("val"))
    return {v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)}


def functional_form(node: fx.Node, cache: dict[Any, OpOverload | None]) -> OpOverload | None:
    """Return the functional form of an in-place operation, or ``None`` if the dtype differs."""
    target: Any = node.target
    values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    key = target, *(getattr(leaf, "dtype", type(leaf)) for leaf in pytree.tree_leaves(values))
    if key not in cache:
        packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
        form = getattr(packet, target._overloadname, None)
        if form is not None:
            args, kwargs = values
            with node.meta["val"].fake_mode:
                form = form if form(*args, **kwargs).dtype == node.meta["val"].dtype else None
        cache[key] = form
    return cache[key]


def apply_functional_ops(graph: fx.Graph, forms: dict[fx.Node, OpOverload]) -> None:
    """Replace in-place operations by their functional forms, and later uses by the results."""
    same = same_tensors(graph)
    latest: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        node.args, node.kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: latest.get(same[n], n)
        )
        if node in forms:
            latest[same[node]] = node
            node.target = forms[node]


# --- composite operations -----------------------------------------------------------------------


def decompose(
    node: fx.Node, decomposition: Callable[..., Any], traced: dict[Any, fx.Graph]
) -> None:
    """Replace a composite operation by its parts.

    Parameters
    ----------
    node : fx.Node
    decomposition : callable
        Computes the operation by others.
    traced : dict
        The graphs of decompositions so far, so that equal operations are traced once.
    """
    leaves, structure = pytree.tree_flatten((node.args, dict(node.kwargs)))
    slots = [slot for slot, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    values = [leaves[slot].meta["val"] for slot in slots]

    def run(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for slot, tensor in zip(slots, tensors, strict=True):
            filled[slot] = tensor
        args, kwargs = pytree.tree_unflatten(filled, structure)
        return decomposition(*args, **kwargs)

    key = call_key(node.target, leaves, values)
    if key not in traced:
        traced[key] = trace_function(run, values)
    with node.graph.inserting_before(node):
        result = inline_graph(node.graph, traced[key], [leaves[slot] for slot in slots], node)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):  # each takes one of several results
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def call_key(target: Any, leaves: Sequence[Any], values: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return a key that is equal for calls of one operator that decompose alike.

    Parameters
    ----------
    target : OpOverload
    leaves : sequence
        The flattened arguments.
    values : sequence of Tensor
        The fake tensors among them, in order.
    """
    constants = [None if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    # Arguments that are one tensor are one input of the traced graph.
    same = [next(k for k, other in enumerate(values) if other is v) for v in values]
    sizes = ((str(v.shape), str(v.stride()), v.dtype) for v in values)
    return (target, str(constants), *same, *sizes)
