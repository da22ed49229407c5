"""A picture of a graph, by Graphviz: what was done to each operation, in boxes for the modules."""

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
from fxshap.report.tables import shape_of

if TYPE_CHECKING:
    import graphviz

#: What is said in the legend, and the colour, by treatment.
COLOURS = {
    "closed": ("closed rule", "#92c5de"),
    "generic": ("generic rule", "#f4a582"),
    "linear": ("linear", "#f2f2f2"),
    "folded": ("of weights alone", "#d9d9d9"),
    "end": ("input, output", "#d9f0d3"),
    "other": ("no gradient", "#ffffff"),
}


def draw_graph(
    graph: fx.Graph, treatments: Mapping[fx.Node, str | None], title: str, path: Path
) -> None:
    """Write the picture of a graph.

    Parameters
    ----------
    graph : fx.Graph
        Nodes carry ``meta["val"]`` and the stack of the user's modules.
    treatments : mapping of fx.Node to str
        ``closed``, ``generic`` or ``linear``, for the operations that were treated.
    title : str
    path : Path
        Its suffix is the format; ``.dot`` needs no more than the package ``graphviz``.

    Raises
    ------
    MissingExtraError, OptionError
        As :meth:`fxshap.report.report.Report.draw` says.
    """
    try:
        import graphviz
    except ImportError as error:
        raise MissingExtraError(
            "drawing needs the package graphviz: pip install 'fxshap[draw]'"
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


def draw(graph: fx.Graph, treatments: Mapping[fx.Node, str | None], title: str) -> graphviz.Digraph:
    """Draw the operations and what passes between them; weights are left out."""
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
        home = innermost(user_module(node), boxes)
        boxes[home].node(node.name, label_of(node, home), fillcolor=COLOURS[kind][1])
    for module in sorted(boxes, key=len, reverse=True):  # the inner before the outer
        if module:
            boxes[innermost(module.rpartition(".")[0], boxes)].subgraph(boxes[module])
    for node in shown:
        for source in taken_by(node):
            if source in shown:
                drawing.edge(source.name, node.name)
    return drawing


def modules_to_box(nodes: Sequence[fx.Node]) -> list[str]:
    """Return the modules of more than one node, and of a module in another alone the inner."""
    sizes = Counter(module for node in nodes for module in enclosing(user_module(node)))
    inner: dict[str, int] = {}
    for module, size in sizes.items():
        outer = module.rpartition(".")[0]
        inner[outer] = max(inner.get(outer, 0), size)
    return [module for module, size in sizes.items() if size > 1 and inner.get(module) != size]


def enclosing(module: str) -> list[str]:
    """Return a module and those that it is in, the outermost first; the model itself is none."""
    return list(accumulate(module.split("."), "{}.{}".format)) if module else []


def innermost(module: str, boxes: Container[str]) -> str:
    """Return the innermost box around a module; '' for the whole picture."""
    return next((name for name in reversed(enclosing(module)) if name in boxes), "")


def taken_by(node: fx.Node) -> list[fx.Node]:
    """Return the sources of a node; of the output the model's own, without the taps."""
    return [node.args[0][0]] if node.op == "output" else node.all_input_nodes  # type: ignore[index,list-item]


def kind_of(node: fx.Node, treatments: Mapping[fx.Node, str | None]) -> str | None:
    """Return a key of `COLOURS`; ``None`` for what is not drawn: weights and sizes."""
    if node.op in ("placeholder", "output"):
        return "end"
    if node.op == "get_attr":
        return "folded" if str(node.target).startswith("folded_") else None
    if not node.meta.get("varying", False):
        return None
    picks = node.target is operator.getitem and has_floating_output(node)  # one of several outputs
    return treatments.get(node) or ("linear" if picks else "other")


def label_of(node: fx.Node, home: str) -> str:
    """Return the name of a node, its module if that is not the box it is in, and its shape."""
    module, value = user_module(node), node.meta.get("val")
    small = [module] if module != home else []
    if isinstance(value, Tensor):
        small.append(shape_of(value))
    lines = [f'<br/><font point-size="10" color="#555555">{escape(s)}</font>' for s in small if s]
    return f"<<b>{escape(node.name)}</b>{''.join(lines)}>"


def legend(title: str, kinds: Sequence[str]) -> str:
    """Return the title above the colours and what they mean."""
    cells = "".join(f'<td bgcolor="{COLOURS[k][1]}">{COLOURS[k][0]}</td>' for k in kinds)
    return (
        f'<<table border="0" cellborder="0" cellspacing="6"><tr><td colspan="{len(kinds)}">'
        f"<b>{escape(title)}</b></td></tr><tr>{cells}</tr></table>>"
    )
