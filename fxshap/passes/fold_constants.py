"""The pass that moves what depends only on weights into a graph of its own."""

from __future__ import annotations

from torch import Tensor, fx


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
