"""The calls of an explainable model: ordinary ones, and requests for multipliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxshap.autograd.tape import with_multipliers
from fxshap.errors import InputError, ModelError
from fxshap.frontend.arguments import Arguments, Call, arguments_key
from fxshap.frontend.bound import check_single_row, find_shared, unwrap_shared
from fxshap.frontend.entry import EntryPoint, nest_arguments, record_layer
from fxshap.frontend.inputs import (
    check_compatible,
    check_inputs,
    check_rows_present,
    has_rows,
    name_shapes_on_failure,
)
from fxshap.frontend.outputs import (
    check_output,
    check_output_count,
    check_rows,
    pick_output,
    select_output,
)
from fxshap.frontend.signature import signature
from fxshap.integrations.detect import (
    Request,
    calling_library,
    counted_outputs,
    needs_gradient,
    requested_layer,
)
from fxshap.integrations.hooks import hook_keys
from fxshap.integrations.isolation import evaluation_mode
from fxshap.ops.dtypes import is_floating
from fxshap.passes.split_at_layer import check_tensor_count
from fxshap.runtime.attributions import PairBatches
from fxshap.runtime.captures import CaptureCache
from fxshap.runtime.engine import Engine
from fxshap.runtime.locks import explanation_lock
from fxshap.runtime.options import Options
from fxshap.state import restore_state

#: Enters a context in which an error removes the hooks of the calling library.
Guard = Callable[[], AbstractContextManager[None]]


def may_differ(value: Any) -> bool:
    """Return True if a tensor may differ between samples and references: floats, and ids."""
    if is_floating(value):
        return True
    pairs = has_rows(value) and len(value) % 2 == 0
    return pairs and not value[: len(value) // 2].equal(value[len(value) // 2 :])


def check_repeated_arguments(call: Call, explained: Sequence[int]) -> None:
    """Raise an InputError if Captum has repeated an argument that has no rows."""
    for index, value in enumerate(call.leaves):
        if index not in explained and has_rows(value) and len(value) != call.rows:
            raise InputError(
                f"Captum repeats the tensors in additional_forward_args for the baselines, and one "
                f"of shape {(len(value) // 2, *value.shape[1:])} has not the rows of the inputs; "
                "bind an argument that all rows share by its name: explainable.bind(name=value)"
            )


@dataclass(frozen=True)
class ModelCalls:
    """Answers the calls of an explainable model.

    Attributes
    ----------
    model : nn.Module
        The user's model.
    options : Options
    bound : mapping
        Arguments of the model that are not explained, by name.
    captures : CaptureCache
    sharing : dict
        By the kind of a call, the indices of the bound tensors without rows.
    """

    model: nn.Module
    options: Options
    bound: Mapping[str, Any]
    captures: CaptureCache
    sharing: dict[Any, frozenset[int]] = field(default_factory=dict)

    def with_bound(self, arguments: Mapping[str, Any]) -> ModelCalls:
        """Return the calls of the same model with more bound arguments.

        Raises
        ------
        InputError
            If the model takes no such argument.
        """
        return replace(self, bound={**self.bound, **nest_arguments(self.model, arguments)})

    # --- the model's own result -----------------------------------------------------------------

    def run(self, call: Call) -> Any:
        """Return the model's own result."""
        bound = unwrap_shared(self.expand(call))
        args, kwargs = unwrap_shared((call.args, call.kwargs))
        return self.options.entry(self.model, *args, **bound, **kwargs)

    def output(self, call: Call) -> Any:
        """Return what `options.output` picks from the model's own result."""
        return pick_output(self.run(call), self.options.output)

    def explained_output(self, call: Call) -> Tensor:
        """Return the output that is explained, of shape (rows, ...), as of rows among others.

        Models treat a single row in their own way: ``squeeze()`` removes it, and a batch norm may
        be left out. References and samples are compared in one batch, so a single row is run
        twice. A state that the model keeps from call to call stays as it is.

        Raises
        ------
        InputError
            If the model fails.
        OutputError
            If there is no such output, or it has other rows.
        """
        if call.rows == 1:
            with suppress(Exception), restore_state(self.model):  # of a model for a single row
                twice = select_output(self.run(call.with_rows(2)), self.options.output)
                if len(twice) == 2:
                    return twice[:1].detach()
        failure = name_shapes_on_failure(self.model, call.leaves, call.missing(self.bound))
        with failure, restore_state(self.model):
            result = self.run(call)
        return select_output(result, self.options.output).detach()

    def expand(self, call: Call, pairs: bool = False) -> dict[str, Any]:
        """Return the bound arguments for a call, with as many rows, and the shared ones marked."""
        bound = call.missing(self.bound)
        return call.expand(bound, self.shared(call), pairs)

    def shared(self, call: Call) -> frozenset[int]:
        """Return the indices of the bound tensors without rows; see :func:`find_shared`."""
        bound = call.missing(self.bound)
        leaves, spec = pytree.tree_flatten(bound)
        if not call.rows or not any(map(has_rows, leaves)):
            return frozenset()
        if self.options.entry.unbatched:
            return frozenset(range(len(leaves)))
        keys = arguments_key(call.leaves, call.spec, 1), arguments_key(leaves, spec, 0)
        kind = (self.options.entry, *keys)
        if kind not in self.sharing:
            with explanation_lock(), evaluation_mode(self.model), torch.no_grad():
                shared = find_shared(bound, partial(self._run_bound, call))
                if shared is None:
                    shared = self._shared_as_it_is(call, bound)
                self.sharing[kind] = shared
        return self.sharing[kind]

    def _shared_as_it_is(self, call: Call, bound: Mapping[str, Any]) -> frozenset[int]:
        """Return the bound tensors of several rows if the model takes them as they are, or none.

        That is for models that take the rows of this call only, or are called without a batch
        dimension.
        """
        args, kwargs = unwrap_shared((call.args, call.kwargs))
        try:
            with restore_state(self.model):
                self.options.entry(self.model, *args, **unwrap_shared(dict(bound)), **kwargs)
        except Exception:
            return frozenset()
        leaves = enumerate(pytree.tree_leaves(dict(bound)))
        return frozenset(index for index, value in leaves if has_rows(value) and len(value) > 1)

    def _run_bound(self, call: Call, arguments: dict[str, Any], rows: int) -> Tensor | None:
        """Return the output for bound arguments as they are; None if it has not `rows` rows."""
        given = call.with_rows(rows)
        args, kwargs = unwrap_shared((given.args, given.kwargs))
        try:
            with restore_state(self.model):
                result = self.options.entry(self.model, *args, **arguments, **kwargs)
            output = select_output(result, self.options.output)
        except Exception:
            return None
        return output if len(output) == rows else None

    def prefix(self, call: Call) -> Any:
        """Return the tensor at the layer where the model was split, or a tuple of several."""
        hook_point = self.options.entry.hook_point
        if hook_point is None:
            raise ModelError("this model is explained from its inputs; split it with split_at(...)")
        given = signature(self.model).bind_partial(*call.args, **call.kwargs).arguments
        bound = {name: value for name, value in self.bound.items() if name not in given}
        calls = replace(self, bound=bound, options=replace(self.options, entry=EntryPoint()))
        bound = unwrap_shared(calls.expand(call))
        with evaluation_mode(self.model):
            return record_layer(self.model, hook_point, *call.args, **bound, **call.kwargs)

    # --- explanations ---------------------------------------------------------------------------

    def capture(self, inputs: Sequence[Tensor]) -> None:
        """Capture the model in evaluation mode, for inputs like these."""
        check_inputs(inputs)
        call = Call.of(inputs, {})
        with explanation_lock(), evaluation_mode(self.model):
            self.captures.get(self._arguments(call, call.where(is_floating)), self.options)

    def _arguments(self, call: Call, explained: Sequence[int], pairs: bool = False) -> Arguments:
        return Arguments.of(call, self.expand(call, pairs), explained)

    def sample_arguments(self, samples: Call) -> Arguments:
        """Return the arguments of a call for samples, all of whose own tensors are explained."""
        check_inputs(samples.args)
        return self._arguments(samples, range(len(samples.args)))

    def alike(self, samples: Arguments, background: Sequence[Tensor]) -> list[list[int]]:
        """Return the rows of samples that one graph explains, in a list for each graph.

        Those are all rows, unless Python code reads their bound arguments and computes something
        else for the samples together than for each of them.

        Parameters
        ----------
        samples : Arguments
        background : sequence of Tensor
            The explained inputs of the references.
        """
        groups = samples.rows_by_bound()
        if len(groups) == 1:
            return groups
        firsts = samples.take([rows[0] for rows in groups])
        engine = self._sample_engine(samples, self._references(samples, background))
        if engine.computes_each_row(firsts.tensors):
            return [list(range(len(samples.tensors[0])))]
        return groups

    def _references(self, samples: Arguments, background: Sequence[Tensor]) -> Arguments:
        """Return the arguments of the references of the first sample."""
        rows = len(background[0])
        bound = [x[:1].expand(rows, *x.shape[1:]) for x in samples.tensors[samples.explained :]]
        return replace(samples, tensors=[*background, *bound])

    def _sample_engine(self, samples: Arguments, references: Arguments) -> Engine:
        engine = self.captures.get(references, self.options)
        alike = len(samples.rows_by_bound()) == 1  # they bind what the references do
        if not alike and not engine.holds(samples.tensors):
            engine = self.captures.get(samples, self.options)
        return engine

    def pair_batches(
        self, samples: Arguments, background: Sequence[Tensor], outputs: int
    ) -> PairBatches:
        """Return what explains batches of samples.

        Parameters
        ----------
        samples : Arguments
            Those of rows that one graph explains, from :meth:`alike`.
        background : sequence of Tensor
            The explained inputs of the references.
        outputs : int
            How many outputs the model had when the explainer was created.
        """
        references, explanation = self._references(samples, background), object()
        engine = self._sample_engine(samples, references)
        for part in zip(*(x.split(len(background[0])) for x in samples.tensors), strict=True):
            engine.check_decisions(part, references.tensors, explanation)
        return PairBatches(engine, background, explanation, outputs)

    def prepare_for_shap(self, call: Call) -> Tensor:
        """Return the output for the background, checked, when SHAP creates an explainer."""
        check_inputs(call.args, "shap")
        check_rows_present("background", [x for x in call.args if isinstance(x, Tensor)])
        check_single_row(call.missing(self.bound), self.shared(call))
        layer = requested_layer(self.model, "shap")
        hook_point = layer.hook_point if layer else None
        with layer.suspended() if layer else nullcontext():
            check_compatible(call.args, self.model, lambda: self.run(call))
            output = self.explained_output(call)
            check_output(output, call.args, "shap")
            tensors = []
            if layer or not self.captures.engines:
                arguments = self._arguments(call, call.where(is_floating))
                engine = self.captures.get(arguments, self.options, hook_point)
                tensors = engine.prepare(arguments.tensors)
        if layer:
            check_tensor_count(layer.hook_point, tensors, call.args)
            layer.call_hook(tensors)
        return output

    def explain(self, request: Request, call: Call, probe: nn.Module, guard: Guard) -> Tensor:
        """Return the output for rows ``[samples; references]``, with multipliers as gradients.

        Parameters
        ----------
        request : Request
            What the library requests.
        call : Call
        probe : nn.Module
            The module that the library has hooked.
        guard : callable
            The context of each backward pass.
        """
        layer = request.layer
        indices = call.where(may_differ if layer else needs_gradient)
        if calling_library() == "captum":
            check_repeated_arguments(call, indices)
        arguments = self._arguments(call, indices, pairs=True)
        explained = arguments.tensors[: arguments.explained]
        if layer is None:
            check_inputs(explained)
        samples, references = arguments.halves()
        with layer.suspended() if layer else nullcontext():
            hook_point = layer.hook_point if layer else None
            engine = self.captures.get(references, self.options, hook_point)
            sample, reference = map(engine.program_inputs, (samples.tensors, references.tensors))
            # The libraries register new hooks for every explanation.
            explanation = hook_keys(probe) or object()
            engine.check_decisions(samples.tensors, references.tensors, explanation)
            by_shap = calling_library() == "shap"
            backward, output = engine.explain(sample, reference, explanation, averaged=by_shap)
            check_output_count(output, counted_outputs() if by_shap else None)
            single = output.shape[1:] == (1,) and self._returns_numbers(call)
        check_rows(output, arguments.tensors)

        def guarded_backward(grad: Tensor) -> list[Tensor]:
            with explanation_lock(), guard():
                return backward(grad.unsqueeze(1) if single else grad)

        output = output.squeeze(1) if single else output

        if layer is None:
            return with_multipliers(guarded_backward, output, explained)
        rows = [torch.cat(pair) for pair in zip(sample, reference, strict=True)]
        rows = [x.requires_grad_() for x in rows[: engine.program.explained]]
        return with_multipliers(guarded_backward, output, layer.call_hook(rows))

    def _returns_numbers(self, call: Call) -> bool:
        """Return True if the caller expects outputs of shape (rows,), as the model returns them.

        Libraries expect one column, but they may call a module of the user's around the
        explainable model.
        """
        if calling_library(directly=True):
            return False
        with torch.no_grad(), restore_state(self.model):
            result = self.output(call)
        return isinstance(result, Tensor) and result.dim() == 1
