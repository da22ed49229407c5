"""The whole backward pass as one graph, compiled by ``torch.compile``.

Rules read their taps several times in every backward pass, once for each small operation. Here the
backward pass is traced once, with the operations of all its rules in sequence, and compiled.
Elementwise operations then take one pass over memory. Weights, taps and what the tape caches of the
references are arguments, so one compiled function serves every state of the weights and all
references of one shape.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxshap._compat import hashable_spec
from fxshap.autograd.rescale import Endpoints
from fxshap.autograd.tape import EndpointBackward, Multipliers, Recording, Taps, split_by_cotangent
from fxshap.errors import CompileError
from fxshap.graph.nodes import tensor_at
from fxshap.rules.core.caching import cached_values, with_cached_values
from fxshap.rules.core.tracing import any_unless_tracing, tracing_rules

logger = logging.getLogger("fxshap")

CompiledFn = Callable[..., Sequence[Tensor]]


class CompiledBackward:
    """The compiled backward passes of one capture, one for each kind of arguments.

    Parameters
    ----------
    rescaled_graph : fx.GraphModule
        ``rescaled_graph(endpoints, *inputs) -> output``.
    explained : int
        How many of the inputs, the first ones, have multipliers.
    """

    def __init__(self, rescaled_graph: fx.GraphModule, explained: int) -> None:
        self.rescaled_graph = rescaled_graph
        self.explained = explained
        self.weights = sorted({n.target for n in rescaled_graph.graph.nodes if n.op == "get_attr"})
        self.functions: dict[Any, CompiledFn] = {}

    def record(self, references: Sequence[Tensor], endpoints: Endpoints) -> EndpointBackward:
        """Return the backward pass between these references and samples.

        Parameters
        ----------
        references : sequence of Tensor
            One tensor per input.
        endpoints : Endpoints
            Its `copies` is the number of cotangents in one batched backward pass.
        """
        return CompiledRecording(self, references, endpoints).backward

    def __call__(self, copies: int, *arguments: Any) -> Sequence[Tensor] | None:
        """Run :func:`record_and_backward` compiled; trace and compile each new kind of arguments.

        Return ``None`` if an assumption of the compiled function does not hold.
        """
        weights = {name: tensor_at(self.rescaled_graph, name) for name in self.weights}
        leaves, structure = pytree.tree_flatten((weights, *arguments))
        metadata = tuple((x.shape, x.stride(), x.dtype, x.device) for x in leaves)
        kind = copies, hashable_spec(structure), metadata
        with torch.no_grad():
            if kind not in self.functions:
                logger.debug("compiles the backward pass of %d cotangents", copies)
                function = partial(
                    record_and_backward, self.rescaled_graph, self.explained, copies, structure
                )
                self.functions[kind] = compile_function(function, leaves)
            *cotangents, violated = self.functions[kind](*leaves)
        return None if any_unless_tracing(violated) else cotangents


class CompiledRecording:
    """Like :class:`fxshap.autograd.tape.Recording`, but runs a compiled function."""

    def __init__(
        self, compiled: CompiledBackward, references: Sequence[Tensor], endpoints: Endpoints
    ) -> None:
        self.compiled = compiled
        self.references = references
        self.endpoints = endpoints

    def backward(self, reference: Taps, sample: Taps, grads: Sequence[Tensor]) -> Multipliers:
        """Return the multipliers between two endpoints, for one cotangent per copy."""
        copies = len(grads)
        cached = {name: cached_values(tap) for name, tap in reference.items()}
        self.endpoints.check_jumps(reference, sample)
        grad = torch.cat(list(grads))
        batched = self.compiled(copies, self.references, reference, cached, sample, grad)
        if batched is None:
            return self.fallback.backward(reference, sample, grads)
        return split_by_cotangent(batched, copies)

    @cached_property
    def fallback(self) -> Recording:
        """The backward pass for inputs on which the compiled function assumes too much."""
        compiled = self.compiled
        return Recording(
            compiled.rescaled_graph, self.references, compiled.explained, self.endpoints
        )


def record_and_backward(
    rescaled_graph: fx.GraphModule,
    explained: int,
    copies: int,
    structure: pytree.TreeSpec,
    *leaves: Tensor,
) -> Sequence[Tensor]:
    """Record and run a backward pass, as a function of tensors only.

    Of the recording, only shapes and weights remain in the traced graph. The last of the returned
    tensors is True if an assumption of the rules does not hold.
    """
    weights, references, reference, cached, sample, grad = pytree.tree_unflatten(leaves, structure)
    run = _WithWeights(rescaled_graph, weights).run
    reference = {name: with_cached_values(tap, cached[name]) for name, tap in reference.items()}
    recording = Recording(run, references, explained, Endpoints())
    if copies > 1:
        endpoints = recording.endpoints.for_copies(copies)
        recording = Recording(run, references, explained, endpoints)
    recording.endpoints.reference, recording.endpoints.sample = reference, sample
    with tracing_rules() as assumptions:
        cotangents = recording.input_cotangents(grad)
    violated = torch.stack([grad.new_zeros((), dtype=torch.bool), *assumptions]).any()
    return [*cotangents, violated]


class _WithWeights(fx.Interpreter):
    """Runs a graph with other weights than its own."""

    def __init__(self, module: fx.GraphModule, weights: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.weights = weights

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        """Return the weight of that name."""
        return self.weights[target]


def replace_out_arguments(graph: fx.Graph) -> None:
    """Replace ``op(..., out=x)`` by a copy: ``torch.compile`` needs `x` to be contiguous."""
    for node in list(graph.nodes):
        if node.op == "call_function" and "out" in node.kwargs:
            rest = {key: value for key, value in node.kwargs.items() if key != "out"}
            out = node.kwargs["out"]
            with graph.inserting_before(node):
                result = graph.call_function(node.target.overloadpacket, node.args, rest)
                copied = graph.call_function(torch.ops.aten.copy_.default, (out, result))
            node.replace_all_uses_with(copied)
            graph.erase_node(node)


def compile_function(function: Callable[..., Any], leaves: Sequence[Tensor]) -> CompiledFn:
    """Trace a function of tensors and compile the graph."""
    # Not the taps themselves: the tracer must not find the values that are cached for them.
    traced = make_fx(function)(*[x.detach().clone() for x in leaves])
    replace_out_arguments(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    compiled: CompiledFn = torch.compile(traced, fullgraph=True, dynamic=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.6 warns of what its cache does not store
            compiled(*leaves)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CompileError(
            "torch.compile could not compile the backward pass; compile=True needs a C++ compiler "
            "(g++ or clang) on the CPU and Triton on a GPU. Without compile=True nothing is "
            f"compiled. torch says: {str(error).strip().splitlines()[0]}"
        ) from error
    return compiled
