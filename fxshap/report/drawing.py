"""Draw a graph with Graphviz: operations coloured by treatment, modules as boxes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, fx

from fxshap.errors import MissingExtraError, OptionError
from fxshap.graph.nodes import has_floating_output
from fxshap.graph.provenance import user_module
from fxshap.report.tables import format_shape

if TYPE_CHECKING:
    import graphviz

#: By kind of node: the text of the legend, and the colour.
COLOURS = {
    "closed": ("closed rule", "#92c5de"),
    "generic": ("generic rule", "#f4a582"),
    "linear": ("linear", "#f2f2f2"),
    "folded": ("of weights only", "#d9d9d9"),
    "boundary": ("input, output", "#d9f0d3"),
    "other": ("no gradient", "#ffffff"),
}


def draw_graph(graph: fx.Graph, treatments: Mapping[fx.Node, str], title: str, path: Path) -> None:
    """Draw a graph to a file.

    Parameters
    ----------
    graph : fx.Graph
        Its nodes have ``meta["val"]``, ``meta["varying"]`` and the stack of the user's modules.
    treatments : mapping of fx.Node to str
        The treatment of every operation that has one: ``closed``, ``generic`` or ``linear``.
    title : str
        The heading of the picture.
    path : Path
        The file to write. Its suffix is the format; ``.dot`` needs only the package ``graphviz``.

    Raises
    ------
    MissingExtraError, OptionError
        See :meth:`fxshap.report.report.Report.draw`.
    """
    try:
        import graphviz
    except ImportError as error:
        raise MissingExtraError(
            "drawing needs the package graphviz: pip install graphviz"
        ) from error
    suffix = path.suffix.removeprefix(".")
    if suffix not in graphviz.FORMATS:
        raise OptionError(f"cannot draw to {path}: use .dot, .svg, .png or .pdf")
    drawing = draw(graph, treatments, title)
    if suffix in ("dot", "gv"):
        path.write_text(drawing.source)
        return
    try:
        path.write_bytes(drawing.pipe(format=suffix))
    except graphviz.ExecutableNotFound as error:
        raise MissingExtraError(
            f"a {path.suffix} needs the program `dot` of Graphviz, which is not installed "
            "(https://graphviz.org/download); a .dot does not"
        ) from error


def draw(graph: fx.Graph, treatments: Mapping[fx.Node, str], title: str) -> graphviz.Digraph:
    """Return the drawing of the operations and the edges between them, without the weights."""
    import graphviz

    font = {"fontname": "Helvetica,Arial,sans-serif"}
    shown = {node: kind for node in graph.nodes if (kind := kind_of(node, treatments))}
    kinds = [kind for kind in COLOURS if kind in shown.values()]
    drawing = graphviz.Digraph(
        graph_attr={**font, "labelloc": "t", "label": legend(title, kinds)},
        node_attr={**font, "shape": "box", "style": "rounded,filled", "margin": "0.12,0.06"},
        edge_attr={"color": "#777777", "arrowsize": "0.7"},
    )
    boxes = {"": drawing}
    for module in modules_to_box(list(shown)):
        boxes[module] = graphviz.Digraph(
            name=f"cluster_{module}",
            graph_attr={**font, "label": module, "color": "#bbbbbb", "style": "rounded"},
        )
    for node, kind in shown.items():
        box = innermost_box(user_module(node), boxes)
        boxes[box].node(node.name, label_of(node, box), fillcolor=COLOURS[kind][1])
    for module in sorted(boxes, key=len, reverse=True):  # inner boxes before outer ones
        if module:
            boxes[innermost_box(module.rpartition(".")[0], boxes)].subgraph(boxes[module])
    for node in shown:
        for source in sources_of(node):
            if source in shown:
                drawing.edge(source.name, node.name)
    return drawing


def modules_to_box(nodes: Sequence[fx.Node]) -> list[str]:
    """Return the modules to draw as boxes.

    These are the modules with more than one node. If all nodes of a module are in one of its
    submodules, only the submodule gets a box.
    """
    sizes = Counter(module for node in nodes for module in enclosing_modules(user_module(node)))
    largest_child: dict[str, int] = {}
    for module, size in sizes.items():
        parent = module.rpartition(".")[0]
        largest_child[parent] = max(largest_child.get(parent, 0), size)
    return [m for m, size in sizes.items() if size > 1 and largest_child.get(m) != size]


def enclosing_modules(module: str) -> list[str]:
    """Return a module and the modules that contain it, the outermost first, without the model."""
    return list(accumulate(module.split("."), "{}.{}".format)) if module else []


def innermost_box(module: str, boxes: Container[str]) -> str:
    """Return the innermost box that contains a module; '' for the whole picture."""
    return next((name for name in reversed(enclosing_modules(module)) if name in boxes), "")


def sources_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a node reads. The output reads the model's output; taps are omitted."""
    return [node.args[0][0]] if node.op == "output" else node.all_input_nodes  # type: ignore[index,list-item]


def kind_of(node: fx.Node, treatments: Mapping[fx.Node, str]) -> str | None:
    """Return the key of `COLOURS` for a node; ``None`` if it is not drawn, as weights and sizes."""
    if node.op in ("placeholder", "output"):
        return "boundary"
    if node.op == "get_attr":
        return "folded" if str(node.target).startswith("folded_") else None
    if not node.meta.get("varying", False):
        return None
    selects_output = node.target is operator.getitem and has_floating_output(node)
    return treatments.get(node) or ("linear" if selects_output else "other")


def label_of(node: fx.Node, box: str) -> str:
    """Return the name of a node, its module unless that is its box, and its shape."""
    module, value = user_module(node), node.meta.get("val")
    small = [module] if module != box else []
    if isinstance(value, Tensor):
        small.append(format_shape(value))
    lines = [f'<br/><font point-size="10" color="#555555">{escape(s)}</font>' for s in small if s]
    return f"<<b>{escape(node.name)}</b>{''.join(lines)}>"


def legend(title: str, kinds: Sequence[str]) -> str:
    """Return the title, above a legend of the colours of these kinds."""
    cells = "".join(f'<td bgcolor="{COLOURS[k][1]}">{COLOURS[k][0]}</td>' for k in kinds)
    return (
        f'<<table border="0" cellborder="0" cellspacing="6"><tr><td colspan="{len(kinds)}">'
        f"<b>{escape(title)}</b></td></tr><tr>{cells}</tr></table>>"
    )
