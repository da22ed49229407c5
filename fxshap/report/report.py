"""What was done to a model: a table of its operations, and a picture of its graph."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import fx

from fxshap.graph.nodes import call_nodes, has_floating_output, varying_slots
from fxshap.graph.provenance import user_module
from fxshap.ops.frozen import frozen_convolution
from fxshap.passes.insert_rescale import needs_rule, original_operator
from fxshap.passes.pipeline import RewrittenModel
from fxshap.report.drawing import draw_graph
from fxshap.report.tables import count, html_table, name_of, shape_of, shorten, text_table
from fxshap.rules.core.dispatch import choose_rule
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Rule, Target

if TYPE_CHECKING:
    import pandas as pd

Treatment = Literal["generic", "closed", "linear", "folded"]
#: In the order of interest.
TREATMENTS: tuple[Treatment, ...] = ("generic", "closed", "linear", "folded")
#: Fewest characters for the names of modules in a table of text.
NARROWEST = 20


@dataclass(frozen=True)
class ReportEntry:
    """What was done to the operations of one type.

    Attributes
    ----------
    operation : str
        The operator, such as ``aten.gelu.default``.
    nodes : int
        How many there are in the graph.
    treatment : str
        ``closed`` or ``generic`` for the rule in place of the derivative, ``linear`` where the
        derivative is exact, ``folded`` for what depends on weights alone and is computed once.
    rule : str
        The name of the rule; empty if there is none.
    modules : tuple of str
        The qualified names of the user's modules they came from; ``forward`` is the model's own.
    """

    operation: str
    nodes: int
    treatment: Treatment
    rule: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What was done to a model, by type of operation; as a string, a table.

    Attributes
    ----------
    model : str
        The class of the model.
    inputs : tuple of str
        The shapes and dtypes it was captured for, ``*`` for any number of rows.
    entries : tuple of Entry
        Generic rules first, then closed ones, linear operations and what was folded.
    graph : fx.Graph
        The captured graph.
    """

    model: str
    inputs: tuple[str, ...]
    entries: tuple[ReportEntry, ...]
    graph: fx.Graph = field(repr=False, compare=False)

    def nodes(self, *treatments: Treatment) -> int:
        """Return how many nodes were treated in one of these ways."""
        return sum(entry.nodes for entry in self.entries if entry.treatment in treatments)

    @property
    def generic(self) -> list[str]:
        """The operations that take the generic rule."""
        return sorted(e.operation for e in self.entries if e.treatment == "generic")

    @property
    def summary(self) -> str:
        """The counts, in one line."""
        return (
            f"{count(self.nodes('closed', 'generic'), 'node')} rewritten ({self.nodes('closed')} "
            f"by closed rules, {self.nodes('generic')} by the generic rule), "
            f"{self.nodes('linear')} linear, {self.nodes('folded')} folded"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, ready for JSON."""
        operations = [{**asdict(entry), "modules": list(entry.modules)} for entry in self.entries]
        counts = {treatment: self.nodes(treatment) for treatment in TREATMENTS}
        return {
            "model": self.model,
            "inputs": list(self.inputs),
            "nodes": counts,
            "operations": operations,
        }

    def to_pandas(self) -> pd.DataFrame:
        """Return a frame of one row for every type of operation."""
        import pandas as pd  # SHAP brings it

        names = ["operation", "nodes", "treatment", "rule", "modules"]
        return pd.DataFrame(self.to_dict()["operations"], columns=names)

    def draw(self, path: str | Path) -> None:
        """Draw the graph, with the rewritten nodes coloured and the user's modules as boxes.

        Parameters
        ----------
        path : str or Path
            Where to; the suffix says what: ``.dot`` for the source, ``.svg``, ``.png``, ``.pdf``.

        Raises
        ------
        MissingExtraError
            If the package ``graphviz`` is not installed (``pip install 'fxshap[draw]'``), or,
            for anything but ``.dot``, the program `dot` of Graphviz is not.
        OptionError
            If Graphviz does not know the suffix.
        """
        treatments = {node: treatment_of(node) for node in self.graph.nodes}
        draw_graph(self.graph, treatments, f"{self.model}: {self.summary}", Path(path))

    def __str__(self) -> str:
        title = f"{self.model}, captured for {', '.join(self.inputs)}"
        if not self.entries:
            return f"{title}\n{self.summary}"
        left = ("operation", "treatment", "modules")
        records = self._records()
        narrow = text_table([{**record, "modules": ""} for record in records], left)
        others = len(narrow.splitlines()[0]) - len("modules")
        room = get_terminal_size().columns - others
        for record in records:
            record["modules"] = shorten(record["modules"], max(room, NARROWEST))
        return f"{title}\n{self.summary}\n\n{text_table(records, left)}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        title = escape(f"{self.model}, captured for {', '.join(self.inputs)}")
        return f"<p>{title}<br>{escape(self.summary)}</p>{html_table(self._records())}"

    def _records(self) -> list[dict[str, str]]:
        return [
            {
                "operation": entry.operation.removeprefix("aten.").removesuffix(".default"),
                "nodes": str(entry.nodes),
                "treatment": ": ".join(dict.fromkeys(filter(None, [entry.treatment, entry.rule]))),
                "modules": ", ".join(summarise(entry.modules)),
            }
            for entry in self.entries
        ]


def make_report(model: str, rewritten: RewrittenModel) -> Report:
    """Report on a rewritten model of a class of this name."""
    groups: dict[tuple[Treatment, str, str], list[str]] = defaultdict(list)
    for node, treatment in treated(rewritten):
        name = "" if treatment in ("linear", "folded") else rule_of(node).name
        groups[treatment, str(original_operator(node)), name].append(user_module(node) or "forward")
    entries = [
        ReportEntry(operation, len(modules), treatment, rule, tuple(dict.fromkeys(modules)))
        for (treatment, operation, rule), modules in groups.items()
    ]
    entries.sort(key=lambda e: (TREATMENTS.index(e.treatment), -e.nodes, e.operation))
    graph = rewritten.tapped_graph.graph
    inputs = tuple(describe_input(node) for node in graph.nodes if node.op == "placeholder")
    return Report(model, inputs, tuple(entries), graph)


def treated(rewritten: RewrittenModel) -> Iterator[tuple[fx.Node, Treatment]]:
    """Iterate over the operations that were treated in some way."""
    for node in call_nodes(rewritten.tapped_graph.graph):
        if (treatment := treatment_of(node)) is not None:
            yield node, treatment
    for node in call_nodes(rewritten.constants.graph):
        if node.target is not operator.getitem and not node.meta.get("variance"):
            yield node, "folded"


def treatment_of(node: fx.Node) -> Treatment | None:
    """Say what was done to a node; ``None`` if it is no operation on what depends on the input."""
    if node.op != "call_function" or not node.meta["varying"] or node.target is operator.getitem:
        return None
    if not has_floating_output(node):
        return None
    if node.target is frozen_convolution or not needs_rule(node):
        return "linear"
    return "closed" if rule_of(node).closed else "generic"


def rule_of(node: fx.Node) -> Rule:
    """Return the rule that a nonlinear node takes."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta.get("val"))
    slots, target = tuple(varying_slots(node)), cast(Target, node.target)
    return choose_rule(*Operation.bind(target, args, kwargs, slots=slots))


def describe_input(node: fx.Node) -> str:
    """Return the shape and dtype of an input, ``*`` for any number of rows."""
    value = node.meta["val"]
    return f"({shape_of(value)}) {name_of(value.dtype)}"


def summarise(modules: Iterable[str]) -> list[str]:
    """Put names together that differ in their numbers alone: ``layers.*.act (12)``."""
    groups: dict[str, list[list[str]]] = defaultdict(list)
    for name in modules:
        groups[re.sub(r"\b\d+\b", "*", name)].append(name.split("."))
    summary = []
    for names in groups.values():
        parts = [
            part if len({part, *rest}) == 1 else "*" for part, *rest in zip(*names, strict=True)
        ]
        summary.append(".".join(parts) + (f" ({len(names)})" if len(names) > 1 else ""))
    return summary
