"""Split a captured graph at a layer: what enters or leaves a module becomes the features.

SHAP and Captum hook the layer, call the model, and differentiate with respect to what the hook has
seen. The layers of a rewritten graph are never called, so the graph is cut at the tensors that pass
the hook: the prefix leads from the model's inputs to them, the suffix from them to the output. The
suffix is explained like any model, and the hook gets the tensors that it would have seen.

If the model has a path around the layer, the suffix also takes the model's inputs. They differ
between sample and reference too and get no attribution, as in SHAP: what goes around the layer is
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
from fxshap.graph.nodes import size_key, tensor_at
from fxshap.graph.provenance import source_line


@dataclass(frozen=True)
class ModelPrefix:
    """The part of a model before a layer: from the model's inputs to those of the suffix.

    Attributes
    ----------
    module : fx.GraphModule
        ``module(*inputs) -> tensors that pass the hook point``.
    weights : dict of str to str
        As in :class:`Captured`.
    """

    module: fx.GraphModule
    weights: dict[str, str]

    @torch.no_grad()
    def __call__(self, model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs of the suffix: what passes the hook point, and the model's inputs."""
        for name, path in self.weights.items():
            if hasattr(self.module, name):
                setattr(self.module, name, tensor_at(model, path).detach())
        return [*self.module(*inputs), *inputs]


def split_at_hook_point(captured: Captured, hook_point: HookPoint) -> tuple[ModelPrefix, Captured]:
    """Cut a captured graph at the tensors that pass a hook point.

    Parameters
    ----------
    captured : Captured
        Its graph returns ``(output, (tensors that pass the hook point))``.
    hook_point : HookPoint
        Named in messages.

    Returns
    -------
    prefix : ModelPrefix
    suffix : Captured
        Its first inputs, which are explained, are the tensors that depend on the model's inputs.

    Raises
    ------
    InputError
        If none of the tensors does, or one does not have the rows of the batch in its first
        dimension.
    """
    graph = mark_varying(captured.module.graph)
    returned: Any = graph.output_node().args[0]
    result, passing = returned
    sources = list(
        {source: None for node in passing if (source := skip_identities(node)).meta["varying"]}
    )
    check_rows_first(graph, sources, hook_point)
    suffix = suffix_graph(graph, sources, result)
    warn_about_bypasses(suffix, len(sources), hook_point)
    root = captured.module
    prefix = fx.GraphModule(root, prefix_graph(graph, sources), "Prefix")
    module = fx.GraphModule(root, suffix, "Suffix")
    return (
        ModelPrefix(prefix, captured.weights),
        replace(captured, module=module, explained=len(sources)),
    )


def prefix_graph(graph: fx.Graph, sources: Sequence[fx.Node]) -> fx.Graph:
    """Return the part of a graph that leads to some nodes, which it returns."""
    prefix = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    prefix.graph_copy(graph, copies)
    prefix.output(tuple(copies[source] for source in sources))
    prefix.eliminate_dead_code()
    return prefix


def suffix_graph(graph: fx.Graph, sources: Sequence[fx.Node], result: fx.Node) -> fx.Graph:
    """Return the part of a graph that leads from some nodes to the result.

    Its first inputs replace the nodes, the others are the graph's own.
    """
    suffix = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for position, source in enumerate(sources):
        copies[source] = suffix.placeholder(f"passing_{position}")
        copies[source].meta = dict(source.meta)
    for node in graph.nodes:
        if node.op == "placeholder" and node in copies:  # the model's input itself is a source
            suffix.placeholder(str(node.target)).meta = dict(node.meta)
        elif node.op == "output":
            suffix.output(copies[result])
        elif node not in copies:
            copies[node] = suffix.node_copy(node, copies.__getitem__)
    suffix.eliminate_dead_code()
    return suffix


def check_rows_first(graph: fx.Graph, sources: Sequence[fx.Node], hook_point: HookPoint) -> None:
    """Raise unless every tensor has as many rows as the model's inputs."""
    if not sources:
        raise InputError(
            f"{hook_point} cannot be explained: it does not depend on the model's input"
        )
    first = next(node for node in graph.nodes if node.op == "placeholder")
    rows = size_key(first.meta["val"].shape[0])
    for source in sources:
        shape = source.meta["val"].shape
        if size_key(shape[0]) != rows:
            sizes = ", ".join("rows" if size_key(size) == rows else str(size) for size in shape)
            raise InputError(
                f"{hook_point} cannot be explained: its shape is ({sizes}), and attributions need "
                "one row for every row of the model's input, in the first dimension; choose a "
                "module before or after the rows are moved"
            )


def warn_about_bypasses(suffix: fx.Graph, passing: int, hook_point: HookPoint) -> None:
    """Warn if the output depends on the model's inputs on a path around the hook point."""
    placeholders = [node for node in suffix.nodes if node.op == "placeholder"]
    own_inputs = [p for p in placeholders[passing:] if not p.meta.get("bound")]
    around = value_dependents(suffix, own_inputs)
    through = value_dependents(suffix, placeholders[:passing])
    if suffix.output_node().args[0] in around:
        meet = next((node for node in suffix.nodes if node in around and node in through), None)
        where = f", to meet it at {source_line(meet)}" if meet is not None else ""
        warnings.warn(
            f"the model goes around {hook_point}{where}: what goes around gets no attribution, so "
            "the attributions do not add up to the whole difference of the outputs",
            stacklevel=2,
        )


def check_tensor_count(
    hook_point: HookPoint, passing: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Raise if more tensors pass than SHAP has room for: as many as the model has inputs."""
    if len(passing) > len(inputs):
        raise InputError(
            f"{hook_point} is {len(passing)} tensors, and SHAP keeps attributions of layers for as "
            f"many tensors as the model has inputs, here {len(inputs)}; use fxshap.DeepExplainer, "
            "which takes the same arguments and has no such limit"
        )
