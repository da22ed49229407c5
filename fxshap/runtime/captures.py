"""The captures of one model, one for each kind of arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxshap.capture.export import capture, with_two_rows
from fxshap.capture.sparse import is_sparse
from fxshap.errors import CaptureError
from fxshap.frontend.arguments import Arguments, constant_key
from fxshap.frontend.hook_point import HookPoint
from fxshap.frontend.inputs import check_compatible
from fxshap.frontend.outputs import select_output
from fxshap.passes.split_at_layer import split_at_hook_point
from fxshap.runtime.batching import check_assumed, check_prefix_rows
from fxshap.runtime.engine import Engine
from fxshap.runtime.locks import capture_lock
from fxshap.runtime.options import Options
from fxshap.runtime.program import Program
from fxshap.runtime.progress import progress_bar
from fxshap.runtime.row_independence import relative_difference
from fxshap.runtime.settings import PLAIN, settings_of, state_of
from fxshap.state import Attribute, restore_state

logger = logging.getLogger("fxshap")

#: The largest number of cached captures. The least recently used one is dropped first.
MAX_CAPTURES = 8


class CaptureCache:
    """The latest captures of a model.

    Parameters
    ----------
    model : nn.Module
        The user's model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.engines: dict[Any, Engine] = {}
        #: The attributes that ``forward`` itself assigns.
        self.state: set[Attribute] = set()

    def get(
        self, arguments: Arguments, options: Options, hook_point: HookPoint | None = None
    ) -> Engine:
        """Return the capture for arguments of this kind; capture the model if there is none.

        Parameters
        ----------
        arguments : Arguments
            Its tensors are the example inputs of a new capture.
        options : Options
        hook_point : HookPoint, optional
            Where in the model the explained tensors are, instead of its inputs.
        """
        call = options.entry, hook_point, arguments.kind
        key = self._find((*call, *self._model_key()), arguments.tensors)
        if key is None:
            engine, state = capture_engine(self.model, arguments, options, hook_point)
            self.state |= state
            engine.state = state_of(self.state)
            kind = (*call, *self._model_key())
            key = (kind, engine.program.rows, engine.program.captured.guards)
            self.engines[key] = engine
        self.engines[key] = self.engines.pop(key)  # the latest last
        while len(self.engines) > MAX_CAPTURES:
            del self.engines[next(iter(self.engines))]
            logger.debug("dropped the least recently used capture")
        return self.engines[key]

    def _model_key(self) -> tuple[Any, ...]:
        """Return what the model is captured again for: modes, constants and settings."""
        modes = tuple((module, module.training) for module in self.model.modules())
        return modes, constants_of(self.model, self.state), settings_of(self.model, self.state)

    def _find(self, kind: Any, tensors: Sequence[Tensor]) -> Any:
        """Return the key of the capture of this kind that holds for the present values."""
        for key, engine in reversed(self.engines.items()):
            # A model that fixes its number of rows is captured once for each number.
            if key[:2] in ((kind, None), (kind, len(tensors[0]))):
                if engine.holds(tensors) and engine.has_state(state_of(self.state), tensors):
                    return key
                logger.debug("a capture does not hold: a decision would be another now")
        return None

    @property
    def latest(self) -> Engine:
        """The capture that was used last.

        Raises
        ------
        CaptureError
            If there is none.
        """
        if not self.engines:
            raise CaptureError(  # not an AttributeError, which nn.Module would hide
                "the model is captured at the first explanation; call capture(*inputs) before it"
            )
        return next(reversed(self.engines.values()))

    def clear(self) -> None:
        """Free the memory that the tapes of all captures take."""
        for engine in self.engines.values():
            engine.clear_cache()


def constants_of(model: nn.Module, state: Set[Attribute]) -> tuple[Any, ...]:
    """Return what identifies the arrays and sparse tensors that modules hold.

    A graph has copies of them. What ``forward`` itself assigns, `state`, does not belong to them.
    """
    keys = []
    for module in model.modules():
        for values in (vars(module), module._buffers, module._parameters):
            for name, value in values.items():
                kind = type(value)
                if kind in PLAIN or kind is dict or not is_held(value):
                    continue
                if not state or (module, name) not in state:
                    keys.append(array_key(value))
    return tuple(keys)


def is_held(value: Any) -> bool:
    """Return True for an array or a sparse tensor."""
    return isinstance(value, np.ndarray) or is_sparse(value)


def array_key(value: Any) -> Any:
    """Return what is equal for an array or sparse tensor with the same contents."""
    if isinstance(value, np.ndarray):
        return constant_key(value)
    stored = value._values() if value.layout is torch.sparse_coo else value.values()
    return value.shape, stored.data_ptr(), stored._version, value._version


def capture_engine(
    model: nn.Module, arguments: Arguments, options: Options, hook_point: HookPoint | None
) -> tuple[Engine, set[Attribute]]:
    """Capture a model with the tensors of a call, and split it at a hook point if one is given.

    Returns
    -------
    engine : Engine
    state : set of (nn.Module, str)
        The attributes that ``forward`` assigns.
    """
    inputs, template = arguments.tensors, arguments.template

    def call(model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        return template.call(partial(options.entry, model), tensors)

    def plain(tensors: Sequence[Tensor]) -> Tensor:
        own = [x.detach().clone() for x in tensors]  # a model may change its inputs
        if len(own[0]) == 1:  # `squeeze()` removes a single row
            with suppress(Exception), restore_state(model):  # of a model for a single row
                twice = select_output(call(model, list(map(with_two_rows, own))), options.output)
                if len(twice) == 2:
                    return twice[:1]
        return select_output(call(model, own), options.output)

    name = type(model).__name__
    with (
        capture_lock(),
        progress_bar(f"fxshap captures {name}, once for all inputs of this kind", options.progress),
    ):
        # Fake tensors accept other dtypes: export would capture a model that cannot run.
        check_compatible(inputs, model, lambda: call(model, inputs))
        captured = capture(model, inputs, options.output, arguments.explained, call, hook_point)
        prefix = None
        if hook_point is not None:
            if captured.assumed:
                check_assumed(captured.module(*inputs)[0], plain(inputs))
            prefix, suffix = split_at_hook_point(captured, hook_point)
            check_prefix_rows(prefix, model, inputs, suffix, arguments.explained)
            captured = suffix
        compared = plain if captured.assumed and prefix is None else None
        program = Program(model, captured, options.rule == "variance", options.compile, compared)
        rows = inputs if captured.rows else list(map(with_two_rows, inputs))
        state = check_repeatable(model, lambda: plain(rows))
    return Engine(program, options, prefix, plain), state


@torch.no_grad()
def check_repeatable(model: nn.Module, run: Callable[[], Tensor]) -> set[Attribute]:
    """Return the attributes that a model assigns; raise if it returns another output again.

    Random numbers of torch are in its graph, which a pass checks; here they are the same in both
    runs. This is for those of NumPy and Python, and for a state outside of the model.

    Parameters
    ----------
    model : nn.Module
    run : callable
        Runs the model on the same inputs.

    Raises
    ------
    CaptureError
        If the output is another one.
    """
    with restore_state(model) as state, torch.random.fork_rng(devices=[]):
        first = run()
    with restore_state(model), torch.random.fork_rng(devices=[]):
        second = run()
    if relative_difference(first, second) > torch.finfo(first.dtype).eps ** 0.5:
        raise CaptureError(
            f"{type(model).__name__} returns another output when it is called again with the same "
            "inputs: it draws random numbers with NumPy or Python (numpy.random, random), or keeps "
            "a state outside of the model. So it has no single output to explain; give it fixed "
            "numbers, or an argument that is bound (explainable.bind)"
        )
    return state
