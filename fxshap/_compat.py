"""The differences between releases of PyTorch, NumPy and Python, in one place.

Every function names the releases that it is for, and why. It tests whether a feature exists where
it can, and otherwise compares the release of PyTorch. On the newest release none has an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table, decompositions
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

from fxshap._requirements import release_of
from fxshap.state import restore_attributes

aten = torch.ops.aten

#: Operators that only state the bounds of a size.
SIZE_CONSTRAINTS = (
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


#: The release of PyTorch.
TORCH = release_of(torch.__version__)


# --- Python and NumPy ---------------------------------------------------------------------------


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an error. Python 3.10 does not print notes; there it is only stored."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", ()), note]


def parity(numbers: NDArray[np.int64]) -> NDArray[Any]:
    """Return 1 where a non-negative number has an odd count of bits, and 0 elsewhere.

    NumPy has ``bitwise_count`` since 2.0.

    Examples
    --------
    >>> parity(np.array([0, 1, 2, 3, 7])).tolist()
    [0, 1, 1, 0, 1]
    """
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(numbers) % 2
    for shift in (32, 16, 8, 4, 2, 1):
        numbers = numbers ^ (numbers >> shift)
    return numbers & 1


# --- types --------------------------------------------------------------------------------------


def existing_dtypes(*names: str) -> tuple[torch.dtype, ...]:
    """Return those dtypes that this release has. Torch up to 2.13 has no ``bcomplex32``.

    Examples
    --------
    >>> existing_dtypes("complex64", "no_such_dtype")
    (torch.complex64,)
    """
    return tuple(getattr(torch, name) for name in names if hasattr(torch, name))


# --- operators ----------------------------------------------------------------------------------


def existing_packets(*names: str) -> tuple[OpOverloadPacket, ...]:
    """Return the packets of those ATen operators that this release has.

    Torch 2.6 has no grouped products, and torch 2.9 not all. Torch 2.14 has no `aten.cholesky`.

    Examples
    --------
    >>> existing_packets("relu", "no_such_operator")
    (<OpOverloadPacket(op='aten.relu')>,)
    """
    return tuple(getattr(aten, name) for name in names if hasattr(aten, name))


# --- while a model is exported ------------------------------------------------------------------


def hashable_spec(spec: pytree.TreeSpec) -> Any:
    """Return a ``TreeSpec``, or its text up to torch 2.7, where it cannot be hashed."""
    try:
        hash(spec)
    except TypeError:
        return repr(spec)
    return spec


@contextmanager
def deny_exporting() -> Iterator[None]:
    """Make ``torch.compiler.is_exporting()`` return False. Torch 2.6 has no such flag."""
    if not hasattr(torch.compiler, "_is_exporting_flag"):
        yield
        return
    before = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = False
    try:
        yield
    finally:
        torch.compiler._is_exporting_flag = before


def skips_contexts() -> bool:
    """Return True if strict export cannot trace our context managers, as up to torch 2.6."""
    return TORCH < (2, 7) and torch.compiler.is_dynamo_compiling()


@contextmanager
def export_workarounds(model: nn.Module, strict: bool) -> Iterator[None]:
    """Work around the faults of releases while a model is exported.

    Parameters
    ----------
    model : nn.Module
    strict : bool
        Whether the model's Python is interpreted instead of run.
    """
    with ExitStack() as workarounds:
        workarounds.enter_context(restore_attributes(model))
        if TORCH < (2, 13):
            workarounds.enter_context(restore_final_states())
            workarounds.enter_context(infer_division_dtypes())
        if TORCH < (2, 11) and not strict:
            workarounds.enter_context(run_compiled_eagerly())
        if TORCH < (2, 9):
            workarounds.enter_context(infer_softmax_of_any_size())
        if TORCH < (2, 7):
            workarounds.enter_context(hide_script_objects(model))
        yield


@contextmanager
def restore_final_states() -> Iterator[None]:
    """Restore the shape of the final states of an LSTM, which torch 2.5 to 2.12 squeeze wrongly."""
    one_layer: Callable[..., Any] = decompositions.one_layer_lstm

    def in_shape(inp: Any, hidden: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        out, states = one_layer(inp, hidden, *args, **kwargs)
        pairs = zip(states, hidden, strict=True)
        return out, tuple(x if x.dim() == h.dim() else x.reshape(h.shape) for x, h in pairs)

    decompositions.one_layer_lstm = in_shape
    try:
        yield
    finally:
        decompositions.one_layer_lstm = one_layer


@contextmanager
def infer_division_dtypes() -> Iterator[None]:
    """Infer that a quotient of integers is floating-point.

    Up to torch 2.12 a shortcut for tensors with symbolic sizes returns integers: torch 2.6 for an
    integer tensor and a number, torch 2.9 for two integer tensors. Without it torch takes the way
    that is right.
    """
    from torch._subclasses.fake_impls import get_fast_op_impls

    shortcuts = get_fast_op_impls()
    shortcut = shortcuts.pop(aten.div.Tensor)
    try:
        yield
    finally:
        shortcuts[aten.div.Tensor] = shortcut


@contextmanager
def infer_softmax_of_any_size() -> Iterator[None]:
    """Infer the result of a softmax without a decision on its size.

    Torch 2.6 decides whether the size is 0, which is unknown for the elements that a mask selects.
    """
    table: Any = decomposition_table
    softmaxes = (aten._softmax.default, aten._log_softmax.default)
    before = {softmax: table[softmax] for softmax in softmaxes}
    table.update(dict.fromkeys(softmaxes, empty_softmax))
    try:
        yield
    finally:
        table.update(before)


def empty_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """Return a tensor with the shape, strides and dtype of a softmax."""
    return torch.empty(x.shape, dtype=torch.float32 if half_to_float else x.dtype, device=x.device)


@contextmanager
def run_compiled_eagerly() -> Iterator[None]:
    """Run compiled submodules eagerly.

    Export of torch 2.6 raises an error at a compiled submodule. Torch 2.9 runs its Inductor code on
    fake tensors, which kills the process.
    """
    import torch._dynamo.config

    with (
        torch._dynamo.config.patch(error_on_nested_fx_trace=False),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


@contextmanager
def hide_script_objects(model: nn.Module) -> Iterator[None]:
    """Hide the C++ objects of ``ScriptModule``s, which export of torch 2.6 takes for constants."""
    from torch._export import non_strict_utils
    from torch.export import _trace

    gather: Callable[..., Any] = non_strict_utils._gather_constant_attrs

    def without_scripts(root: nn.Module) -> Any:
        constants = gather(root)
        for constant in list(constants):
            if isinstance(constant, torch._C.ScriptModule):
                del constants[constant]
        return constants

    modules: Any = (non_strict_utils, _trace)
    for module in modules:
        module._gather_constant_attrs = without_scripts
    try:
        yield
    finally:
        for module in modules:
            module._gather_constant_attrs = gather


# --- exported graphs ----------------------------------------------------------------------------


def replace_views(graph: fx.Graph) -> None:
    """Replace ``view`` by ``reshape`` before torch decomposes operations, up to torch 2.12.

    There the decomposition of attention has other strides than attention itself, so that the views
    after it fail.
    """
    if TORCH < (2, 13):
        replace_operator(graph, aten.view.default, aten.reshape.default)


def replace_positions(graph: fx.Graph) -> None:
    """Replace ``where(mask)`` by the same ``nonzero``, up to torch 2.10.

    There ``run_decompositions`` cannot run it on a mask of unknown size.
    """
    if TORCH < (2, 11):
        replace_operator(graph, aten.where.default, aten.nonzero_numpy.default)


def replace_operator(graph: fx.Graph, old: OpOverload, new: OpOverload) -> None:
    """Call another operator, with the same arguments, wherever a graph calls one."""
    for node in graph.find_nodes(op="call_function", target=old):
        node.target = new


def is_size_constraint(node: fx.Node) -> bool:
    """Return True if a node only states the bounds of a size, as torch 2.6 and 2.9 write it.

    The node would keep alive the values that the size belongs to: those that a mask selects.
    """
    return TORCH < (2, 11) and node.target in SIZE_CONSTRAINTS
