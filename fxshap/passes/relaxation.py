"""The floating-point relaxation of the booleans and integers of a graph.

:mod:`fxshap.passes.relax_booleans` and :mod:`fxshap.passes.relax_indices` fill it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxshap.graph.insertion import insert_call, insert_function
from fxshap.graph.nodes import is_floating_node, nodes_in
from fxshap.ops.dtypes import differentiable

aten = torch.ops.aten


class Relaxation:
    """The floats that relax boolean and integer nodes, built in the order of the graph.

    Parameters
    ----------
    graph : fx.Graph
        Changed in place, at its insertion point.
    dtype : torch.dtype
        The floating-point type of a relaxation that does not follow from an argument.

    Attributes
    ----------
    floats : dict of Node to Node
        The relaxation of a boolean or integer node: the same number as a float.
    one_hot : dict of Node to Node
        For an index, 0/1 floats over the candidates, in the last dimension.
    """

    def __init__(self, graph: fx.Graph, dtype: torch.dtype) -> None:
        self.graph = graph
        self.dtype = dtype
        self.floats: dict[fx.Node, fx.Node] = {}
        self.one_hot: dict[fx.Node, fx.Node] = {}

    def call(self, like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call that gives floats of the shape of another node.

        Their type is the first of: the argument `dtype`, that of a complex argument, that of a
        floating-point argument, and that of the relaxation.
        """
        given = pytree.tree_leaves([n.meta["val"] for n in nodes_in((args, kwargs))])
        floats = [v for v in given if isinstance(v, Tensor) and differentiable(v)]
        dtypes = [v.dtype for v in sorted(floats, key=is_real)]
        dtype = kwargs.get("dtype", dtypes[0] if dtypes else self.dtype)
        meta = {"val": like.meta["val"].to(dtype)}
        return insert_call(self.graph, like, target, args, kwargs, meta=meta)

    def function(
        self, like: fx.Node, function: Callable[..., Any], *inputs: fx.Node, **tracing: bool
    ) -> fx.Node:
        """Add the calls of a function of tensors."""
        result: fx.Node = insert_function(self.graph, like, function, *inputs, **tracing)
        return result

    def index(self, node: fx.Node, one_hot: fx.Node) -> fx.Node:
        """Record the one-hot floats of an index and return its number as a float."""

        def number(ones: Tensor) -> Tensor:
            return (ones * torch.arange(ones.shape[-1], device=ones.device)).sum(-1)

        self.one_hot[node] = one_hot
        return self.function(node, number, one_hot)

    def constant(self, value: float, like: fx.Node) -> fx.Node:
        """Add a constant scalar tensor on the device of another node."""
        value = far_below(self.dtype) if value == -math.inf else value
        kwargs = {"dtype": self.dtype, "device": like.meta["val"].device}
        meta = {"val": like.meta["val"].new_empty([], dtype=self.dtype)}
        return insert_call(self.graph, like, aten.full.default, ([], value), kwargs, meta=meta)

    def as_float(self, value: Any, like: fx.Node) -> fx.Node | None:
        """Return a floating-point node for a node or a number; ``None`` if there is none."""
        if not isinstance(value, fx.Node):
            return self.constant(float(value), like)
        if value in self.floats:
            return self.floats[value]
        if is_floating_node(value):
            return value
        if value.meta["varying"]:
            return None
        return self.call(value, aten._to_copy.default, value, dtype=self.dtype)


def is_real(value: Tensor) -> bool:
    """Return True unless a tensor is complex."""
    return not value.is_complex()


#: Takes a node that depends on a boolean or an integer that is relaxed, or makes one. Returns its
#: floating-point form, or ``None`` if it has none.
RelaxFn = Callable[[Relaxation, fx.Node], fx.Node | None]


def far_below(dtype: torch.dtype) -> float:
    """Return a finite number below any logit, to fill in -inf where the mask depends on the input.

    The slope of a softmax over such a step is its reciprocal, which must be a normal number, also
    when it is multiplied.
    """
    return max(-1e250 if dtype is torch.float64 else -1e30, torch.finfo(dtype).min / 2)
