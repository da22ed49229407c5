"""The whole walk as one graph, fused by ``torch.compile``.

Rules read their taps several times for every walk, a pass over memory for each small operation.
Here the walk is traced once, all its rules laid out one after another, and compiled: what is done
element by element then takes one pass. Weights, taps and what the tape keeps of the references are
arguments, so one compiled walk serves every state of the weights and all references of one shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxshap.autograd.rescale import Endpoints
from fxshap.autograd.tape import Recording, Taps, split_by_cotangent
from fxshap.errors import CompileError
from fxshap.graph.nodes import tensor_at
from fxshap.rules.core.caching import cached_values, with_cached_values
from fxshap.rules.core.tracing import tracing_rules

logger = logging.getLogger("fxshap")

Compiled = Callable[..., Sequence[Tensor]]


class CompiledBackward:
    """The compiled walks of one capture, one for each kind of arguments.

    Parameters
    ----------
    attribute : fx.GraphModule
        ``attribute(ends, *inputs) -> output``.
    explained : int
        How many of the inputs, the first ones, have multipliers.
    """

    def __init__(self, attribute: fx.GraphModule, explained: int) -> None:
        self.attribute = attribute
        self.explained = explained
        self.weights = sorted({n.target for n in attribute.graph.nodes if n.op == "get_attr"})
        self.compiled: dict[Any, Compiled] = {}

    def record(self, references: Sequence[Tensor], ends: Endpoints) -> CompiledRecording:
        """Return what walks between these references, copied for several cotangents, and samples.

        Parameters
        ----------
        references : sequence of Tensor
            One tensor an input.
        ends : Ends
            Whose `copies` says how many cotangents are walked side by side.
        """
        return CompiledRecording(self, references, ends)

    def __call__(self, copies: int, *arguments: Any) -> Sequence[Tensor] | None:
        """Walk, with arguments of :func:`walk`; trace and compile the first of each kind.

        ``None`` where something does not hold that the compiled walk takes for granted.
        """
        weights = {name: tensor_at(self.attribute, name) for name in self.weights}
        leaves, structure = pytree.tree_flatten((weights, *arguments))
        kind = copies, structure, tuple((x.shape, x.stride(), x.dtype, x.device) for x in leaves)
        with torch.no_grad():
            if kind not in self.compiled:
                logger.debug("compiles the walk of %d cotangents", copies)
                function = partial(
                    record_and_backward, self.attribute, self.explained, copies, structure
                )
                self.compiled[kind] = compile_function(function, leaves)
            *found, unlike = self.compiled[kind](*leaves)
        return None if unlike else found


class CompiledRecording:
    """Walks like :class:`fxshap.autograd.tape.Recording`, by a compiled function."""

    def __init__(
        self, fused: CompiledBackward, references: Sequence[Tensor], ends: Endpoints
    ) -> None:
        self.fused = fused
        self.references = references
        self.ends = ends

    def walk(self, reference: Taps, sample: Taps, grads: Sequence[Tensor]) -> list[list[Tensor]]:
        """Walk between two ends, with as many cotangents as there are copies."""
        copies = len(grads)
        kept = {name: cached_values(tap) for name, tap in reference.items()}
        self.ends.refuse_jumps(reference, sample)
        found = self.fused(copies, self.references, reference, kept, sample, torch.cat(list(grads)))
        if found is None:
            return self.careful.walk(reference, sample, grads)
        return split_by_cotangent(found, copies)

    @cached_property
    def careful(self) -> Recording:
        """What walks where the compiled function takes too much for granted."""
        return Recording(self.fused.attribute, self.references, self.fused.explained, self.ends)


def record_and_backward(
    attribute: fx.GraphModule,
    explained: int,
    copies: int,
    structure: pytree.TreeSpec,
    *leaves: Tensor,
) -> Sequence[Tensor]:
    """Record and walk back at once, as a function of nothing but tensors.

    Of the recording only shapes and weights are left in the traced graph. The last of what is
    returned says whether something holds that the rules take not to.
    """
    weights, references, reference, kept, sample, grad = pytree.tree_unflatten(leaves, structure)
    run = _WithWeights(attribute, weights).run
    reference = {name: with_cached_values(tap, kept[name]) for name, tap in reference.items()}
    first = Recording(run, references, explained, Endpoints())
    several = (
        first if copies == 1 else Recording(run, references, explained, first.ends.copied(copies))
    )
    several.ends.reference, several.ends.sample = reference, sample
    # On this thread, as is what the rules are told of tracing.
    with tracing_rules() as taken, torch.autograd.set_multithreading_enabled(False):
        found = several.backward(grad)
    return [*found, torch.stack([grad.new_zeros((), dtype=torch.bool), *taken]).any()]


class _WithWeights(fx.Interpreter):
    """Runs a graph with other weights than its own."""

    def __init__(self, module: fx.GraphModule, weights: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.weights = weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        """Return the weight of that name."""
        return self.weights[target]


def replace_out_arguments(graph: fx.Graph) -> None:
    """Turn ``op(..., out=place)`` into a copy: ``torch.compile`` wants such places contiguous."""
    for node in list(graph.nodes):
        if node.op == "call_function" and "out" in node.kwargs:
            rest = {key: value for key, value in node.kwargs.items() if key != "out"}
            place = node.kwargs["out"]
            with graph.inserting_before(node):
                found = graph.call_function(node.target.overloadpacket, node.args, rest)
                copied = graph.call_function(torch.ops.aten.copy_.default, (place, found))
            node.replace_all_uses_with(copied)
            graph.erase_node(node)


def compile_function(function: Callable[..., Any], leaves: Sequence[Tensor]) -> Compiled:
    """Trace a function of tensors and compile the graph."""
    # Other tensors than the taps themselves: a tracer must not find what is kept on them.
    traced = make_fx(function)(*[x.detach().clone() for x in leaves])
    replace_out_arguments(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    fast: Compiled = torch.compile(traced, fullgraph=True, dynamic=False)
    try:
        fast(*leaves)
    except Exception as error:
        raise CompileError(
            "torch.compile could not compile the walk; compile=True needs a C++ compiler (g++ or "
            "clang) on the CPU and Triton on a GPU. Without compile=True nothing is compiled. "
            f"What torch says: {str(error).strip().splitlines()[0]}"
        ) from error
    return fast
