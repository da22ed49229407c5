"""Readings: where Python takes a number out of a tensor, for an ``if``, a size or a factor.

``torch.export`` rejects ``if mask.any():``, ``int(k)`` and ``.tolist()``, because a fake tensor has
no values. What is read here has one: it is computed from the real values that the trace began with.
Every reading is recorded, and what was read becomes one more output of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
from fxshap.graph.provenance import running_line
from fxshap.graph.symbols import depended_on_values, fix_size, free_unbacked_symbols

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

#: Operators that list the elements which are not 0.
LISTS_OF_NONZEROS = (aten.nonzero, aten.nonzero_numpy, aten.argwhere, aten.where)

#: Methods that read a tensor as a whole.
WHOLE_TENSOR = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
#: Methods that write the values of a tensor as text, most often only to print it.
AS_TEXT = (Tensor.__repr__, Tensor.__format__)


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
    counted = tensor.dtype is torch.bool or func.overloadpacket in LISTS_OF_NONZEROS
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
            self.fix_sizes(func, args, kwargs, output)
        self.values.record(func, args, kwargs, output)
        return output

    def read_size(self, func: Any, args: Any, kwargs: Any) -> None:
        """Record what determines the size of a result."""
        for tensor in pytree.tree_leaves(sizing_arguments(func, args, kwargs)):
            if isinstance(tensor, Tensor):
                self.read(partial(sizing_value, func, tensor), ((tensor,), {}), torch.clone)

    def fix_sizes(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Give a result the sizes that it has, which do not depend on the explained inputs."""
        real = self.values.compute(func, args, kwargs, by_shape=True)
        pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(real), strict=True)
        for fake, value in pairs:
            for size, number in zip(fake.shape, value.shape, strict=True):
                if free_unbacked_symbols(size):
                    fix_size(size, number)

    def with_known_sizes(self, tensor: Tensor) -> Tensor:
        """Return a tensor with sizes that are numbers, if it depends on no explained input.

        Elements are selected by their number, because a decomposition forgets what is asserted.
        """
        dims = [dim for dim, size in enumerate(tensor.shape) if depended_on_values(size)]
        if not dims or self.is_varying(tensor):
            return tensor
        shape = self.values.compute(torch.clone, (tensor,), {}).shape
        for dim in dims:
            numbers = torch.arange(shape[dim], device=tensor.device)
            tensor = tensor.index_select(dim, numbers)
        return tensor

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
        line, varying = running_line(), self.is_varying(arguments)
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
    """Has ``tolist``, ``numpy`` and ``str`` answered as one reading.

    What has a size that depends on values, and on no explained input, gets the size that it has.
    """

    def __init__(self, recorder: ReadingRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        as_text = func in AS_TEXT
        if as_text or func in WHOLE_TENSOR:
            varying = self.recorder.is_varying(args[0])
            if not varying or (self.recorder.answers.varying and not as_text):
                real = self.recorder.read_whole(args[0])
                with real_execution():
                    return func(real, *args[1:], **kwargs)
            self.recorder.left_out += not as_text
        if lists_dimensions(func, args, kwargs) and not self.recorder.is_varying(args):
            listed = self.recorder.with_known_sizes(torch.nonzero(*args[:1]))
            return listed.unbind(1)
        output = func(*args, **kwargs)
        if isinstance(output, Tensor | list | tuple):
            return pytree.tree_map_only(Tensor, self.recorder.with_known_sizes, output)
        return output


def lists_dimensions(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return True for functions that list the elements which are not 0 by dimension."""
    if func is torch.where:
        return len(args) == 1 and not kwargs
    as_tuple = func in (torch.nonzero, Tensor.nonzero) and kwargs.get("as_tuple", False)
    return bool(as_tuple and args and args[0].dim())


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
