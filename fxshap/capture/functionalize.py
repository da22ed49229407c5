"""From an exported graph to a functional one, in which no operation changes a tensor in place.

``torch.export`` records ``x.relu_()`` as it stands. Its own ``run_decompositions`` makes a graph
functional by tracing it twice more, which takes three times as long as the export. Nearly every
model needs much less: an in-place operation on a tensor that nobody sees under another name is the
ordinary operation, and whoever asks for the tensor afterwards gets the result. Where a view of the
tensor is seen too, or an operation is one that torch would take apart, torch does it all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxshap.graph.insertion import inline_graph, trace_function
from fxshap.rules.core.registry import DECOMPOSITIONS, find_rule

aten = torch.ops.aten
KEYS = torch._C.DispatchKey

#: Argument position of ``train`` in the operations that change nothing in evaluation.
DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)
TRAIN = 2


def functionalize(program: ExportedProgram) -> ExportedProgram:
    """Return a functional form of an exported program, with composite operations taken apart.

    Parameters
    ----------
    program : ExportedProgram
        As ``torch.export.export`` returns it; it may be changed.
    """
    forms = functional_forms(program.graph)
    if forms is None:
        decomposed: ExportedProgram = program.run_decompositions(dict(DECOMPOSITIONS))
        return decomposed
    apply_functional_ops(program.graph, forms)
    for node in program.graph.nodes:
        if node.target in DROPOUTS:
            node.target, node.args = aten.alias.default, node.args[:1]
    known: dict[Any, fx.Graph] = {}
    for node in list(program.graph.nodes):
        if node.target in DECOMPOSITIONS:
            decompose(node, DECOMPOSITIONS[node.target], known)
    return program


# --- operations in place ------------------------------------------------------------------------


def functional_forms(graph: fx.Graph) -> dict[fx.Node, OpOverload] | None:
    """Return the ordinary form of every in-place operation; ``None`` if torch must find them."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    same = same_tensors(graph)
    sharing: dict[int, list[fx.Node]] = defaultdict(list)  # the nodes that share a storage
    forms: dict[fx.Node, OpOverload] = {}
    known: dict[Any, OpOverload | None] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            return None
        if (
            node.op == "call_function"
            and not is_in_place(node)
            and not is_preserved(node, node.target)
        ):
            return None
        if is_in_place(node):
            changed = node.args[0]
            form = functional_form(node, known)
            others = [n for s in storages(changed) for n in sharing[s] if same[n] != same[changed]]
            seen_later = any(order[user] > order[node] for n in others for user in n.users)
            if form is None or seen_later or not is_preserved(node, form):
                return None
            forms[node] = form
        for storage in storages(node):
            sharing[storage].append(node)
    return forms


def same_tensors(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return for every node the first of those that stand for the same tensor, changed or not."""
    same: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        same[node] = same[node.args[0]] if is_in_place(node) else node
    return same


def apply_functional_ops(graph: fx.Graph, forms: dict[fx.Node, OpOverload]) -> None:
    """Give in-place operations their ordinary form, and later users of the tensor the result."""
    same = same_tensors(graph)
    latest: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        node.args, node.kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: latest.get(same[n], n)
        )
        if node in forms:
            latest[same[node]] = node
            node.target = forms[node]


def is_in_place(node: fx.Node) -> bool:
    """Say whether a node changes its first argument, and nothing else, and returns it."""
    schema = getattr(node.target, "_schema", None)
    return (
        schema is not None
        and schema.name.startswith("aten::")
        and schema.name.endswith("_")
        and schema.is_mutable
        and isinstance(node.args[0], fx.Node)
    )


def functional_form(node: fx.Node, known: dict[Any, OpOverload | None]) -> OpOverload | None:
    """Return the ordinary form of an in-place operation, if it gives a tensor of the same type."""
    target: Any = node.target
    values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    key = target, *(getattr(leaf, "dtype", type(leaf)) for leaf in pytree.tree_leaves(values))
    if key not in known:
        packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
        form = getattr(packet, target._overloadname, None)
        if form is not None:
            args, kwargs = values
            with node.meta["val"].fake_mode:
                form = form if form(*args, **kwargs).dtype == node.meta["val"].dtype else None
        known[key] = form
    return known[key]


def is_preserved(node: fx.Node, target: Any) -> bool:
    """Say whether an operation can stay as a node calls it; torch takes others apart."""
    if not isinstance(target, OpOverload):  # arithmetic of sizes; the rest are of higher order
        return getattr(target, "__module__", "") in ("_operator", "math", "torch")
    if target in DROPOUTS:
        return not node.args[TRAIN]
    if target in DECOMPOSITIONS or find_rule(target) is not None:
        return True
    apart = target.has_kernel_for_dispatch_key(KEYS.CompositeImplicitAutograd)
    return not (target._schema.is_mutable or apart or KEYS.Autograd in target.py_kernels)


def storages(node: fx.Node) -> set[int]:
    """Return what identifies the memory of a node's values."""
    values = pytree.tree_leaves(node.meta.get("val"))
    return {v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)}


# --- composites ---------------------------------------------------------------------------------


def decompose(node: fx.Node, decomposition: Callable[..., Any], known: dict[Any, fx.Graph]) -> None:
    """Replace a composite operation by its parts; those of equal ones are traced once."""
    leaves, structure = pytree.tree_flatten((node.args, dict(node.kwargs)))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    values = [leaves[place].meta["val"] for place in places]

    def run(*varying: Tensor) -> Any:
        filled = list(leaves)
        for place, value in zip(places, varying, strict=True):
            filled[place] = value
        args, kwargs = pytree.tree_unflatten(filled, structure)
        return decomposition(*args, **kwargs)

    rest = [None if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    same = [next(k for k, other in enumerate(values) if other is v) for v in values]
    sizes = ((str(v.shape), str(v.stride()), v.dtype) for v in values)
    key = (node.target, str(rest), *same, *sizes)
    if key not in known:
        known[key] = trace_function(run, values)
    with node.graph.inserting_before(node):
        whole = inline_graph(node.graph, known[key], [leaves[place] for place in places], node)
    if isinstance(whole, fx.Node):
        node.replace_all_uses_with(whole)
    else:
        for user in list(node.users):  # each takes one of several results
            user.replace_all_uses_with(whole[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
