"""Checks of the inputs of a call and of the model's weights, each with a message of what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.errors import FxshapError, InputError, WeightError
from fxshap.frontend.signature import signature
from fxshap.ops.dtypes import is_floating


def check_floating(inputs: Sequence[Tensor]) -> None:
    """Raise an InputError unless all inputs are floating-point tensors."""
    check_tensors(inputs)
    for position, x in enumerate(inputs):
        if not is_floating(x):
            raise InputError(
                f"input {position} is of {x.dtype}; only floating-point inputs have attributions. "
                "Cast features with .float(), bind the arguments that are not explained "
                "(explainable.bind), and explain token ids from their embeddings "
                "(explainable.split_at)"
            )


def check_tensors(inputs: Sequence[Any]) -> None:
    """Raise an InputError if an input is an array or a table, or no tensor."""
    for position, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(f"input {position} is a {type(x).__name__}, {NOT_A_TENSOR}{remedy(x)}")


#: What messages say of a value that should be a tensor.
NOT_A_TENSOR = "not a torch.Tensor"


def remedy(value: Any) -> str:
    """Return how to make a tensor of a value, for messages."""
    if hasattr(value, "columns"):  # a DataFrame
        return "; pass torch.tensor(table.to_numpy(), dtype=torch.float32)"
    if hasattr(value, "__array__"):
        return "; pass torch.tensor(array, dtype=torch.float32)"
    if isinstance(value, list | tuple) and value and all(isinstance(x, Tensor) for x in value):
        return "; several inputs are one list of tensors, for the background and for the samples"
    return ""


def check_inputs(inputs: Sequence[Tensor], library: str = "") -> None:
    """Raise an InputError unless inputs can be explained.

    Parameters
    ----------
    inputs : sequence of Tensor
        The explained inputs of a call.
    library : str
        The calling library. SHAP also converts the inputs to NumPy arrays.
    """
    check_floating(inputs)
    check_equal_rows(inputs)
    if library == "shap":
        check_numpy_dtypes(inputs)


@contextmanager
def name_shapes_on_failure(
    model: nn.Module, inputs: Sequence[Any], bound: Iterable[str] = ()
) -> Iterator[None]:
    """Raise an InputError with the shapes of the inputs if the user's model fails.

    Parameters
    ----------
    model : nn.Module
        The user's model.
    inputs : sequence
        The arguments of the call.
    bound : iterable of str, optional
        The names of the bound arguments.
    """
    try:
        yield
    except (FxshapError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        name, text = type(model).__name__, (str(error).strip().splitlines() or ["no message"])[0]
        names = list(bound)
        besides = f" and the bound arguments {', '.join(names)}" if names else ""
        takes = ", ".join(map(str, signature(model).parameters.values()))
        raise InputError(
            f"{name}.forward({takes}) fails with inputs of shapes {describe_shapes(inputs)}"
            f"{besides}: {type(error).__name__}: {text}. Inputs are passed in the order of the "
            "parameters, with the rows in the first dimension; input_names= names other "
            "parameters, or the entries of a dict or list"
        ) from error


def describe_shapes(values: Sequence[Any]) -> str:
    """Return the shapes of tensors, and the types of other values, for messages."""
    return ", ".join(
        str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in values
    )


def check_matching_rows(references: Sequence[Any], samples: Sequence[Any]) -> None:
    """Raise an InputError unless references and samples are tensors with rows of the same shapes.

    The number of rows may differ.
    """
    check_rows_present("background", references)
    check_rows_present("samples", samples)
    if len(references) != len(samples):
        raise InputError(
            f"the background has {len(references)} inputs, but the samples have {len(samples)}"
        )
    for position, (r, x) in enumerate(zip(references, samples, strict=True)):
        if r.shape[1:] != x.shape[1:]:
            raise InputError(
                f"rows of input {position} have the shape {tuple(r.shape[1:])} in the background, "
                f"but {tuple(x.shape[1:])} in the samples; the first dimension counts the rows"
            )


def check_equal_rows(inputs: Sequence[Tensor]) -> None:
    """Raise an InputError unless all inputs have the same number of rows."""
    if len({len(x) if x.dim() else None for x in inputs}) > 1:
        raise InputError(
            f"the inputs have the shapes {describe_shapes(inputs)}; each needs as many rows, in "
            "the first dimension. An argument that all rows share is bound: "
            "explainable.bind(name=value)"
        )


def check_rows_present(role: str, inputs: Sequence[Any]) -> None:
    """Raise an InputError unless all inputs are tensors with at least one row."""
    for position, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(
                f"input {position} of the {role} is a {type(x).__name__}, {NOT_A_TENSOR}{remedy(x)}"
            )
        if x.dim() == 0 or len(x) == 0:
            raise InputError(f"input {position} of the {role} has no rows")


@torch.no_grad()
def check_compatible(inputs: Sequence[Tensor], model: nn.Module, call: Callable[[], Any]) -> None:
    """Raise an InputError if the model fails because its weights have another dtype or device.

    Parameters
    ----------
    inputs : sequence of Tensor
    model : nn.Module
    call : callable
        Calls the model with the inputs. It is only called where dtypes or devices differ.
    """
    weights = [p for p in model.parameters() if is_floating(p)]
    facts: dict[str, tuple[set[Any], set[Any]]] = {
        "dtype": ({x.dtype for x in inputs}, {p.dtype for p in weights}),
        "device": ({x.device for x in inputs}, {p.device for p in weights}),
    }
    differ = {
        what: (given.pop(), wanted.pop())
        for what, (given, wanted) in facts.items()
        if given and len(wanted) == 1 and not given & wanted
    }
    if not differ:
        return
    try:
        call()
    except RuntimeError as error:
        what, (given, wanted) = next(reversed(differ.items()))
        raise InputError(
            f"the inputs have the {what} {given}, but the model's weights {wanted}; convert "
            f"samples and background with .to({wanted!r})"
        ) from error


def has_rows(value: Any) -> bool:
    """Return True if a value is a tensor with a first dimension."""
    return isinstance(value, Tensor) and value.dim() > 0


def check_numpy_dtypes(tensors: Sequence[Tensor]) -> None:
    """Raise an InputError if SHAP cannot convert inputs or an output to NumPy arrays."""
    if any(x.dtype is torch.bfloat16 for x in tensors):
        raise InputError(
            "SHAP converts the inputs and the output to NumPy arrays, and NumPy has no bfloat16; "
            "explain a small nn.Module around the model whose forward takes and returns float32: "
            "`return self.model(x.bfloat16()).float()`"
        )


def check_finite(role: str, inputs: Sequence[Tensor]) -> None:
    """Raise an InputError if samples or references contain NaN or infinity."""
    for position, x in enumerate(inputs):
        finite = x.isfinite()
        if not finite.all():
            row = int((~finite).flatten(1).any(1).nonzero()[0])
            raise InputError(
                f"input {position} of the {role} contains NaN or infinity (row {row}), so there "
                "is no difference to attribute; impute or drop such rows"
            )


def check_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Raise a WeightError if a weight contains NaN, or a parameter contains infinity.

    Parameters
    ----------
    weights : mapping of str to Tensor
        By their qualified names. Infinity in a buffer may be a mask.
    """
    for name, weight in weights.items():
        infinite = isinstance(weight, nn.Parameter) and bool(weight.isinf().any())
        if infinite or bool(weight.isnan().any()):
            raise WeightError(
                f"the weight {name!r} contains {'infinity' if infinite else 'NaN'}, so the model "
                "has no attributions; load or train the model again"
            )
