"""Readings: where Python takes a number out of a tensor, for an ``if``, a size or a factor.

``torch.export`` rejects ``if mask.any():``, ``int(k)`` and ``.tolist()``, because a fake tensor has
no values. What is read here has one: it is computed from the real values that the trace began with.
Every reading is recorded, and what was read becomes one more output of the graph.
"""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxshap.capture.real_values import RealValues, named_tensors, real_execution
from fxshap.graph.provenance import UNKNOWN_LINE, format_line, is_user_file

aten = torch.ops.aten
PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def all_equal(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``torch.equal`` as a tensor."""
    return (a == b).all() if a.shape == b.shape else torch.tensor(False)


def all_close(*args: Any, **kwargs: Any) -> Tensor:
    """Compute ``torch.allclose`` as a tensor."""
    return torch.isclose(*args, **kwargs).all()


#: For every operator that returns a Python number, what computes it as a tensor.
AS_TENSOR: dict[OpOverload, Callable[..., Tensor]] = {
    aten._local_scalar_dense.default: torch.clone,
    aten.equal.default: all_equal,
    aten.allclose.default: all_close,
}

#: Operators that read a tensor at indices or where a mask is True, their second argument.
READ_AT = (aten.index, aten.masked_select)

#: Methods that read a tensor as a whole.
WHOLE_TENSOR = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


def is_sized_by_values(func: Any) -> bool:
    """Return True if the size of what an operator returns depends on values."""
    return isinstance(func, OpOverload) and torch.Tag.dynamic_output_shape in func.tags


def sizing_arguments(func: OpOverload, args: Sequence[Any], kwargs: Any) -> Any:
    """Return the arguments whose values determine the size of the result."""
    return args[1] if func.overloadpacket in READ_AT else (args, kwargs)


def sizing_value(func: OpOverload, tensor: Tensor) -> Tensor:
    """Return what of a sizing argument determines the size of the result."""
    if func.overloadpacket is aten.repeat_interleave:
        return tensor.sum()
    counted = tensor.dtype is torch.bool or func.overloadpacket is aten.nonzero
    return tensor.count_nonzero() if counted else tensor.clone()


@dataclass(frozen=True)
class Reading:
    """What Python has read from one tensor.

    Attributes
    ----------
    line : str
        The user's line that reads it.
    value : bool, int, float, complex or Tensor
        What was returned; a tensor if all of it was read.
    varying : bool
        Whether it depends on the values of the explained inputs.
    """

    line: str
    value: Any
    varying: bool


@dataclass(frozen=True)
class Answers:
    """How readings are answered during one trace.

    Attributes
    ----------
    varying : bool
        Whether to answer those that depend on the explained inputs. Otherwise they are left to
        torch, which returns an unknown number or raises.
    altered : dict of str to callable
        For lines whose readings are not answered truly, ``altered[line](value) -> answer``.
    max_readings, max_operations : int or None
        A trace with more of them is not finished.
    """

    varying: bool = False
    altered: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    max_readings: int | None = None
    max_operations: int | None = None


class EndlessTraceError(Exception):
    """A trace takes much longer than the one before it, as with a loop that does not end."""


class ReadingRecorder(TorchDispatchMode):
    """Answers the readings of a trace, and records them.

    Parameters
    ----------
    values : RealValues
        The real values of the tensors that the trace begins with.
    answers : Answers

    Attributes
    ----------
    readings : list of Reading
    tensors : list of Tensor
        What each of them has read, as fake tensors of the trace.
    left_out : int
        How many readings were not answered.
    operations : int
        How many operations the trace has.
    """

    #: Operators that take functions pass through.
    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Have torch compile the functions that such operators take, up to torch 2.12."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Have torch compile the functions that such operators take, without this mode."""
        return True

    def __init__(self, values: RealValues, answers: Answers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = values
        self.answers = answers
        self.proxy_mode = get_proxy_mode()
        self.readings: list[Reading] = []
        self.tensors: list[Tensor] = []
        self.left_out = 0
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in AS_TENSOR:
            if self.answers_to((args, kwargs)):
                return self.read(lambda: AS_TENSOR[func](*args, **kwargs), (args, kwargs), func)
            self.left_out += 1
        self.operations += 1
        if self.operations > (self.answers.max_operations or math.inf):
            raise EndlessTraceError
        sized = is_sized_by_values(func) and not self.is_varying(
            sizing_arguments(func, args, kwargs)
        )
        if sized:
            self.read_size(func, args, kwargs)
        output = func(*args, **kwargs)
        if sized:
            self.fix_size(func, args, kwargs, output)
        self.values.record(func, args, kwargs, output)
        return output

    def read_size(self, func: Any, args: Any, kwargs: Any) -> None:
        """Record what determines the size of a result."""
        for tensor in pytree.tree_leaves(sizing_arguments(func, args, kwargs)):
            if isinstance(tensor, Tensor):
                self.read(partial(sizing_value, func, tensor), ((tensor,), {}), torch.clone)

    def fix_size(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Give a result the size that it has, which does not depend on the explained inputs."""
        real = self.values.compute(func, args, kwargs, by_shape=True)
        pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(real), strict=True)
        for fake, value in pairs:
            for size, number in zip(fake.shape, value.shape, strict=True):
                torch._check(size == number)

    def answers_to(self, arguments: Any) -> bool:
        """Return True if a reading of these arguments is to be answered."""
        return self.answers.varying or not self.is_varying(arguments)

    def is_varying(self, arguments: Any) -> bool:
        """Return True if any of nested values depends on the explained inputs."""
        return any(map(self.values.is_varying, pytree.tree_leaves(arguments)))

    def read(self, compute: Callable[[], Tensor], arguments: Any, func: Any) -> Any:
        """Answer a reading.

        Parameters
        ----------
        compute : callable
            Computes what is read, as a tensor.
        arguments : tuple
            The arguments of the operator, and by name.
        func : callable
            Returns the answer for real arguments.
        """
        value = self.values.compute(func, *arguments)
        line, varying = user_line(), self.is_varying(arguments)
        if varying and line in self.answers.altered:
            with real_execution():  # a tensor that is altered in the trace would be a fake one
                value = self.answers.altered[line](value)
        self.readings.append(Reading(line, value, varying))
        if len(self.readings) > (self.answers.max_readings or math.inf):
            raise EndlessTraceError
        with recorded_by(self.proxy_mode):
            self.tensors.append(compute())
        return value

    def read_whole(self, tensor: Tensor) -> Tensor:
        """Return the real values of a tensor."""
        value: Tensor = self.read(tensor.clone, ((tensor,), {}), torch.clone)
        return value


@dataclass
class Trace:
    """How one export of a model answers readings, and what it has read.

    Attributes
    ----------
    inputs : sequence of Tensor
        The real inputs.
    explained : int
        How many of them are explained.
    weights : dict of str to Tensor
        The real parameters and buffers of the model, by name.
    answers : Answers
    recorder : ReadingRecorder or None
        Of the latest run of the model; ``None`` if no reading could be answered.
    """

    inputs: Sequence[Tensor]
    explained: int
    weights: Mapping[str, Tensor]
    answers: Answers = Answers()
    recorder: ReadingRecorder | None = None

    @contextmanager
    def recording(self, model: nn.Module, inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Answer the readings of a model that runs on fake tensors.

        Yields
        ------
        list of Tensor
            What has been read.
        """
        if not any(map(is_fake, inputs)):
            yield []
            return
        fake = named_tensors(model)
        pairs = [*zip(inputs, self.inputs, strict=True)]
        pairs += [(fake[name], real) for name, real in self.weights.items() if name in fake]
        values = RealValues(pairs, inputs[: self.explained])
        self.recorder = ReadingRecorder(values, self.answers)
        with self.recorder, ReadWholeTensors(self.recorder):
            yield self.recorder.tensors

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What has been read."""
        return tuple(self.recorder.readings) if self.recorder else ()

    @property
    def left_out(self) -> int:
        """How many readings were not answered."""
        return self.recorder.left_out if self.recorder else 0

    @property
    def operations(self) -> int:
        """How many operations the model has run."""
        return self.recorder.operations if self.recorder else 0


class ReadWholeTensors(TorchFunctionMode):
    """Has ``tolist`` and ``numpy`` answered as one reading."""

    def __init__(self, recorder: ReadingRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in WHOLE_TENSOR:
            if self.recorder.answers_to(args[0]):
                real = self.recorder.read_whole(args[0])
                with real_execution():
                    return func(real, *args[1:], **kwargs)
            self.recorder.left_out += 1
        return func(*args, **kwargs)


#: The steps to other numbers, relative to the number and 1. Near ones find that a number enters the
#: computation or is an index, far ones find a comparison with a threshold.
STEPS = (0.1, 1.0, 1e30)
#: The steps to other integers.
INTEGER_STEPS = (1, 10**6)


def alternatives(value: Any) -> list[Any]:
    """Return other values that a reading could have: the other truth value, or other numbers."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, Tensor) and value.dtype is torch.bool:
        return [~value]
    if isinstance(value, int) or (isinstance(value, Tensor) and not value.is_floating_point()):
        steps = [sign * step for step in INTEGER_STEPS for sign in (1, -1)]
        return [value + step for step in steps]
    size = 1 + abs(value)
    return [value + sign * step * size for step in STEPS for sign in (1, -1)]


def alternative(choice: int, value: Any) -> Any:
    """Return one of the :func:`alternatives`, the last if there are fewer."""
    others = alternatives(value)
    return others[min(choice, len(others) - 1)]


def always(truth: bool, value: Any) -> Any:
    """Return the same answer to all questions for a truth value, and numbers as they are."""
    if not is_truth(value):
        return value
    return torch.full_like(value, truth) if isinstance(value, Tensor) else truth


def is_truth(value: Any) -> bool:
    """Return True if a value is a truth value, or a tensor of them."""
    return isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool)


@contextmanager
def recorded_by(proxy_mode: Any) -> Iterator[None]:
    """Record operations from inside a dispatch mode, also where a trace does so before it."""
    if proxy_mode is None or not proxy_mode.pre_dispatch:
        yield
        return
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(PRE_DISPATCH)
    torch._C._dispatch_tls_set_dispatch_key_excluded(PRE_DISPATCH, False)
    try:
        with proxy_mode:
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(PRE_DISPATCH, before)


def user_line() -> str:
    """Return the innermost of the user's lines that run now: ``file:line (`code`)``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return UNKNOWN_LINE
    file, number = frame.f_code.co_filename, frame.f_lineno
    return format_line(file, number, linecache.getline(file, number))
