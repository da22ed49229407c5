"""The report on a rewritten model: a table of its operations, and a picture of its graph."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import fx, nn

from fxshap.graph.nodes import call_nodes, has_floating_output, varying_slots
from fxshap.graph.provenance import user_module
from fxshap.passes.insert_rescale import is_rescaled, original_operator
from fxshap.passes.pipeline import RewrittenModel
from fxshap.report.drawing import draw_graph
from fxshap.report.tables import (
    dtype_name,
    format_shape,
    html_table,
    pluralize,
    text_table,
    truncate,
)
from fxshap.rules.core.dispatch import choose_rule
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Rule, Target

if TYPE_CHECKING:
    import pandas as pd

Treatment = Literal["generic", "closed", "linear", "folded"]

#: All treatments, in the order of the report: what may need attention comes first.
TREATMENTS: tuple[Treatment, ...] = ("generic", "closed", "linear", "folded")

#: The least width of the column of modules in a table of text, in characters.
MIN_MODULES_WIDTH = 20


@dataclass(frozen=True)
class ReportEntry:
    """The treatment of all operations of one type.

    Attributes
    ----------
    operation : str
        The operator, such as ``aten.gelu.default``.
    nodes : int
        The number of nodes in the graph.
    treatment : str
        ``closed`` or ``generic`` if a rule in closed form or the generic rule replaces the
        derivative, ``linear`` if the derivative is exact, ``folded`` if the operation depends on
        the weights only and is computed once.
    rule : str
        The name of the rule; empty if there is none.
    modules : tuple of str
        The qualified names of the user's modules that the nodes come from; ``forward`` is the
        model's own ``forward``.
    """

    operation: str
    nodes: int
    treatment: Treatment
    rule: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The treatment of a model's operations, by type of operation. Its string is a table.

    Attributes
    ----------
    model : str
        The class of the model.
    inputs : tuple of str
        The shapes and dtypes that the model was captured for; ``*`` is any number of rows.
    entries : tuple of ReportEntry
        Operations with the generic rule first, then those with a closed rule, linear operations
        and folded ones.
    graph : fx.Graph
        The captured graph.
    treatments : mapping of fx.Node to str
        The treatment of each operation of `graph`. Integers, sizes and what selects one of several
        outputs have none.
    """

    model: str
    inputs: tuple[str, ...]
    entries: tuple[ReportEntry, ...]
    graph: fx.Graph = field(repr=False, compare=False)
    treatments: Mapping[fx.Node, Treatment] = field(repr=False, compare=False)

    def nodes(self, *treatments: Treatment) -> int:
        """Return the number of nodes with one of these treatments."""
        return sum(entry.nodes for entry in self.entries if entry.treatment in treatments)

    @property
    def generic(self) -> list[str]:
        """The operations with the generic rule."""
        return sorted(e.operation for e in self.entries if e.treatment == "generic")

    @property
    def summary(self) -> str:
        """The counts, in one line."""
        rewritten = pluralize(self.nodes("closed", "generic"), "node")
        return (
            f"{rewritten} rewritten ({self.nodes('closed')} by closed rules, "
            f"{self.nodes('generic')} by the generic rule), "
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
        """Return a data frame with one row for every type of operation."""
        import pandas as pd  # a dependency of SHAP

        names = ["operation", "nodes", "treatment", "rule", "modules"]
        return pd.DataFrame(self.to_dict()["operations"], columns=names)

    def draw(self, path: str | Path) -> None:
        """Draw the graph, with the rewritten nodes coloured and the user's modules as boxes.

        Parameters
        ----------
        path : str or Path
            The file to write. Its suffix is the format: ``.dot`` for the source, ``.svg``,
            ``.png`` or ``.pdf``.

        Raises
        ------
        MissingExtraError
            If the package ``graphviz`` is not installed (``pip install graphviz``), or, for
            any format except ``.dot``, the program `dot` of Graphviz is not installed.
        OptionError
            If Graphviz does not support the suffix.
        """
        title = f"{self.model}: {self.summary}"
        draw_graph(self.graph, self.treatments, title, Path(path))

    def __str__(self) -> str:
        title = f"{self.model}, captured for {', '.join(self.inputs)}"
        if not self.entries:
            return f"{title}\n{self.summary}"
        left = ("operation", "treatment", "modules")
        records = self._records()
        without_modules = text_table([{**record, "modules": ""} for record in records], left)
        other_columns = len(without_modules.splitlines()[0]) - len("modules")
        width = max(get_terminal_size().columns - other_columns, MIN_MODULES_WIDTH)
        for record in records:
            record["modules"] = truncate(record["modules"], width)
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
                "modules": ", ".join(group_numbered_names(entry.modules)),
            }
            for entry in self.entries
        ]


def make_report(model: str, rewritten: RewrittenModel) -> Report:
    """Return the report on a rewritten model, whose class has the name `model`."""
    graph = rewritten.tapped_graph.graph
    treatments = classify_nodes(rewritten)
    folded: dict[fx.Node, Treatment] = dict.fromkeys(folded_nodes(rewritten), "folded")
    groups: dict[tuple[Treatment, str, str], list[str]] = defaultdict(list)
    for node, treatment in (treatments | folded).items():
        rule = rule_of(node).name if treatment in ("closed", "generic") else ""
        groups[treatment, str(original_operator(node)), rule].append(user_module(node) or "forward")
    entries = [
        ReportEntry(operation, len(modules), treatment, rule, tuple(dict.fromkeys(modules)))
        for (treatment, operation, rule), modules in groups.items()
    ]
    entries.sort(key=lambda e: (TREATMENTS.index(e.treatment), -e.nodes, e.operation))
    inputs = tuple(describe_input(node) for node in graph.nodes if node.op == "placeholder")
    return Report(model, inputs, tuple(entries), graph, treatments)


def summarize_module(wrapper: str, model: nn.Module, report: Report | None) -> str:
    """Return three lines on an explainable module: its model, its captures and its operations.

    Parameters
    ----------
    wrapper : str
        The name of the class of the explainable module.
    model : nn.Module
        The user's model.
    report : Report, optional
        The report on the latest capture; ``None`` if there is no capture.
    """
    weights = sum(p.numel() for p in model.parameters())
    modules = pluralize(sum(1 for _ in model.modules()), "module")
    title = f"{wrapper} of {type(model).__name__}: {modules}, {weights:,} parameters"
    if report is None:
        return (
            f"{title}\n  not captured yet\n  the first explanation captures it, or capture(*inputs)"
        )
    return f"{title}\n  captured for {', '.join(report.inputs)}\n  {report.summary}"


def classify_nodes(rewritten: RewrittenModel) -> dict[fx.Node, Treatment]:
    """Return the treatment of every operation of the tapped graph that depends on the input.

    The nodes of the rescaled graph have the same names, and what they are decides: a node that is a
    `rescale` there takes a rule, and any other node has autograd's derivative.
    """
    nodes = call_nodes(rewritten.rescaled_graph.graph)
    rescaled = {node.name for node in nodes if is_rescaled(node)}
    treatments: dict[fx.Node, Treatment] = {}
    for node in call_nodes(rewritten.tapped_graph.graph):
        if node.name in rescaled:
            treatments[node] = "closed" if rule_of(node).closed_form else "generic"
        elif has_derivative(node):
            treatments[node] = "linear"
    return treatments


def has_derivative(node: fx.Node) -> bool:
    """Return True if a node computes a floating-point function of what depends on the input."""
    selects_output = node.target is operator.getitem
    return node.meta["varying"] and not selects_output and has_floating_output(node)


def folded_nodes(rewritten: RewrittenModel) -> list[fx.Node]:
    """Return the operations that depend on the weights only, without those of variances."""
    return [
        node
        for node in call_nodes(rewritten.constants.graph)
        if node.target is not operator.getitem and not node.meta.get("variance")
    ]


def rule_of(node: fx.Node) -> Rule:
    """Return the rule of a nonlinear node."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta.get("val"))
    slots, target = tuple(varying_slots(node)), cast(Target, node.target)
    return choose_rule(*Operation.bind(target, args, kwargs, slots=slots))


def describe_input(node: fx.Node) -> str:
    """Return the shape and dtype of an input, with ``*`` for any number of rows."""
    value = node.meta["val"]
    return f"({format_shape(value)}) {dtype_name(value.dtype)}"


def group_numbered_names(modules: Iterable[str]) -> list[str]:
    """Merge the names that differ only in their numbers, as in ``layers.*.act (12)``."""
    groups: dict[str, list[list[str]]] = defaultdict(list)
    for name in modules:
        groups[re.sub(r"\b\d+\b", "*", name)].append(name.split("."))
    merged = []
    for names in groups.values():
        parts = [
            part if len({part, *rest}) == 1 else "*" for part, *rest in zip(*names, strict=True)
        ]
        merged.append(".".join(parts) + (f" ({len(names)})" if len(names) > 1 else ""))
    return merged
