"""The calls of an explainable model: ordinary ones, and requests for multipliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.autograd.tape import with_multipliers
from fxshap.errors import ModelError
from fxshap.frontend.arguments import Arguments, Call
from fxshap.frontend.entry import record_layer
from fxshap.frontend.hook_point import HookPoint
from fxshap.frontend.inputs import check_compatible, check_inputs
from fxshap.frontend.outputs import check_output, check_rows, pick_output, select_output
from fxshap.frontend.signature import signature
from fxshap.integrations.detect import Request, needs_gradient, requested_layer
from fxshap.integrations.hooks import hook_keys
from fxshap.integrations.isolation import evaluation_mode
from fxshap.ops.dtypes import is_floating
from fxshap.passes.split_at_layer import check_tensor_count
from fxshap.runtime.attributions import PairBatches
from fxshap.runtime.captures import CaptureCache
from fxshap.runtime.locks import explanation_lock
from fxshap.runtime.options import Options

#: Enters a context in which an error removes the hooks of the calling library.
Guard = Callable[[], AbstractContextManager[None]]


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
    """

    model: nn.Module
    options: Options
    bound: Mapping[str, Any]
    captures: CaptureCache

    def run(self, call: Call) -> Any:
        """Return the model's own result."""
        bound = call.expand(self.bound)
        return self.options.entry(self.model, *call.args, **bound, **call.kwargs)

    def output(self, call: Call) -> Any:
        """Return what `options.output` picks from the model's own result."""
        return pick_output(self.run(call), self.options.output)

    def prefix(self, call: Call) -> Any:
        """Return the tensor at the layer where the model was split, or a tuple of several."""
        hook_point = self.options.entry.hook_point
        if hook_point is None:
            raise ModelError("this model is explained from its inputs; split it with split_at(...)")
        given = signature(self.model).bind_partial(*call.args, **call.kwargs).arguments
        bound = {name: value for name, value in self.bound.items() if name not in given}
        with evaluation_mode(self.model):
            return record_layer(
                self.model, hook_point, *call.args, **call.expand(bound), **call.kwargs
            )

    def capture(self, inputs: Sequence[Tensor]) -> None:
        """Capture the model in evaluation mode, for inputs like these."""
        check_inputs(inputs)
        call = Call.of(inputs, {})
        with explanation_lock(), evaluation_mode(self.model):
            arguments = Arguments.of(call, call.expand(self.bound), call.where(is_floating))
            self.captures.get(arguments, self.options)

    def pair_batches(
        self, samples: Call, background: Sequence[Tensor]
    ) -> tuple[PairBatches, list[Tensor]]:
        """Return what explains batches of samples, and the inputs of the program for the samples.

        Parameters
        ----------
        samples : Call
            The samples, with arguments that have a row for each of them.
        background : sequence of Tensor
            The explained inputs of the references.
        """
        check_inputs(samples.args)
        arguments = Arguments.of(samples, samples.expand(self.bound), range(len(samples.args)))
        count = arguments.explained
        rows = len(background[0])
        bound = [x[:1].expand(rows, *x.shape[1:]) for x in arguments.tensors[count:]]
        references = replace(arguments, tensors=[*background, *bound])
        engine = self.captures.get(references, self.options)
        return PairBatches(engine, background, object()), arguments.tensors

    def prepare_for_shap(self, call: Call) -> Tensor:
        """Return the output for the background, checked, when SHAP creates an explainer."""
        check_inputs(call.args, self.bound, "shap")
        layer = requested_layer(self.model, "shap")
        with layer.suspended() if layer else nullcontext():
            check_compatible(call.args, self.model, lambda: self.run(call))
            output = select_output(self.run(call), self.options.output)
            check_output(output, call.args, "shap")
            tensors = self._layer_tensors(call, layer.hook_point) if layer else []
        if layer:
            layer.call_hook(tensors)
        return output

    def _layer_tensors(self, call: Call, hook_point: HookPoint) -> list[Tensor]:
        """Return the tensors at a layer that are explained: at most one for each input."""
        arguments = Arguments.of(call, call.expand(self.bound), call.where(is_floating))
        engine = self.captures.get(arguments, self.options, hook_point)
        tensors = engine.program_inputs(arguments.tensors)[: engine.program.explained]
        check_tensor_count(hook_point, tensors, call.args)
        return tensors

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
        indices = call.where(is_floating if layer else needs_gradient)
        arguments = Arguments.of(call, call.expand(self.bound, pairs=True), indices)
        explained = arguments.tensors[: arguments.explained]
        check_inputs(explained)
        samples, references = arguments.halves()
        with layer.suspended() if layer else nullcontext():
            hook_point = layer.hook_point if layer else None
            engine = self.captures.get(references, self.options, hook_point)
            sample, reference = map(engine.program_inputs, (samples.tensors, references.tensors))
            # The libraries register new hooks for every explanation.
            explanation = hook_keys(probe) or object()
            backward, output = engine.explain(sample, reference, explanation)
        check_rows(output, arguments.tensors)

        def guarded_backward(grad: Tensor) -> list[Tensor]:
            with explanation_lock(), guard():
                return backward(grad)

        if layer is None:
            return with_multipliers(guarded_backward, output, explained)
        rows = [torch.cat(pair) for pair in zip(sample, reference, strict=True)]
        rows = [x.requires_grad_() for x in rows[: engine.program.explained]]
        return with_multipliers(guarded_backward, output, layer.call_hook(rows))
