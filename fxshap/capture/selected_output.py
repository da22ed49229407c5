"""The module that is exported: the user's model, called as the user calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxshap._compat import skips_contexts
from fxshap.capture.diagnostics import convert_data_dependent_errors
from fxshap.capture.groups import EnumerateGroups, GroupChoice
from fxshap.capture.readings import Trace
from fxshap.capture.recurrent import RecordRecurrent, without_packed_checks
from fxshap.capture.sparse import DenseForSparse
from fxshap.capture.tracing import RecordOwnOperators, trace_scripted_modules
from fxshap.errors import InputError
from fxshap.frontend.hook_point import HookPoint, record_tensors, single_call
from fxshap.frontend.inputs import name_shapes_on_failure
from fxshap.frontend.outputs import Selector, select_output

#: How a model is called with tensors: ``call(model, tensors)``.
ModelCall = Callable[[nn.Module, Sequence[Tensor]], Any]


def call_positionally(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Call a model with tensors as its positional arguments, and no others."""
    return model(*inputs)


class SelectedOutput(nn.Module):
    """The module that is exported: calls the user's model and selects the tensor to explain.

    The name of its attribute `model` begins every qualified name in the exported graph.

    Attributes
    ----------
    groups : GroupChoice
        Whether to take every group that rows are routed to as one with rows.
    trace : Trace or None
        How readings are answered, if they are.
    runs_twice : bool
        Whether a single row is run twice, because models treat one in their own way:
        ``squeeze()`` removes it.
    """

    def __init__(
        self,
        model: nn.Module,
        output: Selector,
        call: ModelCall,
        hook_point: HookPoint | None,
        explained: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.call = call
        self.hook_point = hook_point
        self.explained = explained
        self.groups = GroupChoice()
        self.trace: Trace | None = None
        self.runs_twice = False

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensor to explain, those at the hook point, and those that Python reads."""
        if skips_contexts():
            return self.select(inputs)
        with (
            RecordOwnOperators(),
            RecordRecurrent(),
            DenseForSparse(),
            trace_scripted_modules(self.model),
            without_packed_checks(self.model),
            convert_data_dependent_errors(),
        ):
            if self.trace is None:
                return self.select_groups(inputs)
            with self.trace.recording(self.model, inputs) as read:
                returned = self.select_groups(inputs)
            return (*returned, *read)

    def select_groups(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what `select` returns, with groups enumerated if they are to be."""
        if not self.groups.enumerates:
            return self.select(inputs)
        with EnumerateGroups(inputs[: self.explained], self.groups):
            return self.select(inputs)

    @torch.no_grad()
    def check(self, inputs: Sequence[Tensor]) -> None:
        """Raise the model's own error, or that of the output, with the shapes of these inputs."""
        with name_shapes_on_failure(self.model, inputs):
            self.select(inputs)

    def accepts(self, inputs: Sequence[Tensor]) -> bool:
        """Return True if the model runs on these inputs."""
        try:
            self.check(inputs)
        except InputError:
            return False
        return True

    def select(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Call the model; return the tensor to explain, and those at the hook point.

        A model that differentiates inside returns tensors that require a gradient. torch.export
        takes none, so they are detached.
        """
        if self.runs_twice:
            inputs = [torch.cat([x, x]) for x in inputs]
            return (select_output(self.call(self.model, inputs), self.output)[:1].detach(),)
        if self.hook_point is None:
            return (select_output(self.call(self.model, inputs), self.output).detach(),)
        with record_tensors(self.model, self.hook_point) as calls:
            result = select_output(self.call(self.model, inputs), self.output).detach()
        return result, *(x.detach() for x in single_call(self.hook_point, calls))
