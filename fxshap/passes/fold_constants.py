"""Move what depends only on weights into a graph of its own, computed once for all explanations."""

from __future__ import annotations

from torch import Tensor, fx


def fold_constants(graph: fx.Graph) -> tuple[fx.Graph, tuple[str, ...]]:
    """Move what depends only on weights out of a graph, which is changed in place.

    Returns
    -------
    constants : fx.Graph
        ``constants() -> results``, those that the rest of the graph uses.
    names : tuple of str
        The attributes that replace these results in the graph, in the same order.
    """
    constant = constant_nodes(graph)
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
            folded = graph.create_node("get_attr", f"folded_{node.name}")
        folded.meta = {**node.meta, "varying": False}
        node.replace_all_uses_with(folded, delete_user_cb=lambda user: user not in constant)
    graph.eliminate_dead_code()
    return constants, tuple(f"folded_{node.name}" for node in used)


def constant_nodes(graph: fx.Graph) -> dict[fx.Node, None]:
    """Return the weights of a graph and the calls that read nothing else, as an ordered set."""
    constant: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and all(n in constant for n in node.all_input_nodes)
        ):
            constant[node] = None
    return constant
