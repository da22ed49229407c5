"""Explaining from a layer on: what enters or leaves one of the user's modules as the features.

SHAP and Captum hook the layer, call the model, and differentiate with respect to what the hook has
seen. The layers of a rewritten graph are never called, so the graph is cut at the tensors that pass
there: the trunk leads from the model's inputs to them, the head from them to the output. The head
is explained like any model, and the hook is given the tensors it would have seen.

Where the model goes around the layer, the head takes the model's inputs beside those tensors. They
differ between sample and reference too and get no attribution, as in SHAP: what goes around is
missing from the sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshap.capture.captured import Captured
from fxshap.errors import InputError
from fxshap.frontend.hook_point import HookPoint
from fxshap.graph.dataflow import mark_varying, skip_identities, value_dependents
from fxshap.graph.nodes import tensor_at
from fxshap.graph.provenance import source_line


@dataclass(frozen=True)
class ModelPrefix:
    """From the model's inputs to what the head takes.

    Attributes
    ----------
    module : fx.GraphModule
        Takes the model's inputs and returns the tensors that pass the place.
    weights : dict of str to str
        As in :class:`Captured`.
    """

    module: fx.GraphModule
    weights: dict[str, str]

    @torch.no_grad()
    def __call__(self, model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs of the head: what passes the place, and the model's own inputs."""
        for name, path in self.weights.items():
            if hasattr(self.module, name):
                setattr(self.module, name, tensor_at(model, path).detach())
        return [*self.module(*inputs), *inputs]


def split_at_hook_point(captured: Captured, place: HookPoint) -> tuple[ModelPrefix, Captured]:
    """Cut a captured graph at the tensors that pass a place.

    Parameters
    ----------
    captured : Captured
        Its graph returns ``(output, (tensors that pass the place))``.
    place : Place

    Returns
    -------
    trunk : Trunk
    head : Captured
        Its first inputs, the ones explained, are the tensors that depend on the model's inputs.

    Raises
    ------
    InputError
        If none does, or one has not the rows of a batch in its first dimension.
    """
    graph = mark_varying(captured.module.graph)
    returned: Any = graph.output_node().args[0]
    result, passing = returned
    sources = {
        source: None for node in passing if (source := skip_identities(node)).meta["varying"]
    }
    check_rows_first(graph, list(sources), place)

    trunk = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    trunk.graph_copy(graph, copies)
    trunk.output(tuple(copies[source] for source in sources))
    trunk.eliminate_dead_code()

    head = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for position, source in enumerate(sources):
        values[source] = head.placeholder(f"passing_{position}")
        values[source].meta = dict(source.meta)
    for node in graph.nodes:
        if node.op == "placeholder" and node in sources:
            head.placeholder(str(node.target)).meta = dict(node.meta)
        elif node.op == "output":
            head.output(values[result])
        elif node not in sources:
            values[node] = head.node_copy(node, values.__getitem__)
    head.eliminate_dead_code()
    warn_about_bypasses(head, len(sources), place)

    root = captured.module
    module = fx.GraphModule(root, head, "Head")
    return (
        ModelPrefix(fx.GraphModule(root, trunk, "Trunk"), captured.weights),
        replace(captured, module=module, explained=len(sources)),
    )


def check_rows_first(graph: fx.Graph, sources: Sequence[fx.Node], place: HookPoint) -> None:
    """Raise unless every tensor has as many rows as the model's inputs."""
    if not sources:
        raise InputError(f"{place} cannot be explained: it does not depend on the model's input")
    first = next(node for node in graph.nodes if node.op == "placeholder")
    rows = size_key(first.meta["val"].shape[0])
    for source in sources:
        shape = source.meta["val"].shape
        if size_key(shape[0]) != rows:
            sizes = ", ".join("rows" if size_key(size) == rows else str(size) for size in shape)
            raise InputError(
                f"{place} cannot be explained: its shape is ({sizes}), and attributions need one "
                "row for every row of the model's input, in the first dimension; choose a module "
                "before or after the rows are moved"
            )


def size_key(size: int | torch.SymInt) -> Any:
    """Return what tells two sizes apart, without deciding anything about a symbolic one."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def warn_about_bypasses(head: fx.Graph, passing: int, place: HookPoint) -> None:
    """Warn if the output depends on the model's inputs on a way around the place."""
    placeholders = [node for node in head.nodes if node.op == "placeholder"]
    around = value_dependents(head, [p for p in placeholders[passing:] if not p.meta.get("bound")])
    through = value_dependents(head, placeholders[:passing])
    if head.output_node().args[0] in around:
        meet = next((node for node in head.nodes if node in around and node in through), None)
        where = f", to meet it at {source_line(meet)}" if meet is not None else ""
        warnings.warn(
            f"the model goes around {place}{where}: what goes around gets no attribution, so the "
            "attributions do not add up to the whole difference of the outputs",
            stacklevel=2,
        )


def check_tensor_count(
    place: HookPoint, passing: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Raise if more tensors pass than SHAP has room for: as many as the model has inputs."""
    if len(passing) > len(inputs):
        raise InputError(
            f"{place} is {len(passing)} tensors, and SHAP keeps attributions of layers for as many "
            f"tensors as the model has inputs, here {len(inputs)}; explain from there on instead, "
            "with explainable.from_layer(...), which gives a model with that many inputs"
        )
