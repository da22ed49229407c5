"""Selecting the tensor to explain from the model's result, and checks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fxshap.errors import OutputError
from fxshap.frontend.inputs import check_numpy_dtypes
from fxshap.ops.dtypes import is_floating

#: The option ``output=``: a key or attribute name, an index, or a function of the result.
Selector = str | int | Callable[[Any], Tensor] | None


def select_output(result: Any, output: Selector) -> Tensor:
    """Return the floating-point tensor that `output` selects from a model's result.

    Parameters
    ----------
    result : Tensor, dict, dataclass or tuple
        What the model returned.
    output : str, int, callable or None
        A key or attribute name, an index, or a function of `result`.

    Returns
    -------
    Tensor
        Of shape (rows, ...), with at least two dimensions: one number for each row is one column.

    Raises
    ------
    OutputError
        If there is no such output, or it is not a floating-point tensor with rows.
    """
    selected = pick_output(result, output)
    if not isinstance(selected, Tensor):
        raise OutputError(
            f"the model returns {describe_result(selected)}, not one tensor; choose the tensor to "
            "explain with make_explainable(model, output=...), a key, an index or a function"
        )
    if not is_floating(selected):
        raise OutputError(
            f"the model returns a tensor of {selected.dtype}, which has no attributions; choose a "
            "floating-point output, such as the logits, with make_explainable(model, output=...)"
        )
    if selected.dim() == 0:
        raise OutputError(
            "the model returns one number for all rows, a tensor of shape (); every row of the "
            "inputs (their first dimension) needs its own row of outputs: return the values "
            "before the sum, the mean or the loss over the rows"
        )
    columns: Tensor = as_columns(selected)
    return columns


def as_columns(output: Any) -> Any:
    """Return a tensor of shape (rows,) as one column, and everything else as it is."""
    return output.unsqueeze(1) if isinstance(output, Tensor) and output.dim() == 1 else output


def pick_output(result: Any, output: Selector) -> Any:
    """Apply a key, an attribute name, an index or a function to a model's result, unchecked.

    An index of a tensor selects a column, such as a class or a time step, never a row.

    Raises
    ------
    OutputError
        If the result has no such key, attribute or index.
    """
    if output is None:
        return result
    if callable(output):
        return output(result)
    try:
        if isinstance(output, str) and not isinstance(result, dict):
            return getattr(result, output)
        if isinstance(result, Tensor) and isinstance(output, int):
            return as_columns(result[:, output])
        return result[output]
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise OutputError(
            f"output={output!r} is not in the model's result, {describe_result(result)}"
        ) from error


def describe_result(result: Any) -> str:
    """Describe a model's result for messages: its type, with its keys, items or shape."""
    kind = describe_type(result)
    if isinstance(result, dict):
        return f"a {kind} with keys {list(result)}"
    if isinstance(result, tuple | list):
        return f"a {kind} of {len(result)} ({', '.join(map(describe_type, result))})"
    return f"a {kind} of shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {kind}"


def describe_type(value: Any) -> str:
    """Return the name of the type of a value; that of any tensor is "Tensor"."""
    return "Tensor" if isinstance(value, Tensor) else type(value).__name__


def check_output(output: Tensor, inputs: Sequence[Any], library: str = "") -> None:
    """Raise an OutputError unless an output can be explained.

    Parameters
    ----------
    output : Tensor
        The selected output.
    inputs : sequence
        The inputs of the call. Every row of them needs its own row of the output.
    library : str
        The calling library. SHAP needs outputs of two dimensions, and converts them to NumPy.
    """
    if library == "shap":
        check_numpy_dtypes([output])
        check_two_dimensional(output)
    check_rows(output, inputs)


def check_two_dimensional(output: Tensor) -> None:
    """Raise an OutputError unless an output has the shape (rows, outputs), as SHAP requires."""
    if output.dim() != 2:
        raise OutputError(
            f"the model returns a tensor of shape {tuple(output.shape)}; SHAP explains outputs of "
            "shape (rows, outputs). Reshape it with make_explainable(model, output=...), for "
            "example output=lambda y: y.flatten(1)"
        )
    if not output.shape[1]:
        raise OutputError(
            f"the model returns a tensor of shape {tuple(output.shape)}, which has no outputs to "
            "explain (as `h[:, mask]` with a mask that selects nothing)"
        )


def check_output_count(output: Tensor, counted: int | None) -> None:
    """Raise an OutputError unless a model has as many outputs as when its explainer was made.

    Parameters
    ----------
    output : Tensor
        Of shape (rows, outputs).
    counted : int or None
        How many outputs the explainer counted; ``None`` if it counts none.
    """
    if counted is not None and output.shape[1] != counted:
        raise OutputError(
            f"the model returns {output.shape[1]} outputs, and returned {counted} when the "
            "explainer was created (as after a change of a mask that selects outputs); create "
            "another explainer"
        )


def check_rows(output: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raise an OutputError unless the output has one row for every row of the inputs."""
    rows = [len(x) for x in inputs if isinstance(x, Tensor) and x.dim() > 0]
    if any(len(output) != count for count in rows):
        raise OutputError(
            f"the model returns {len(output)} rows for inputs of {', '.join(map(str, rows))}; "
            "every row of the inputs (their first dimension) needs its own row of outputs. A model "
            "of one sample, without a batch dimension, such as a graph or a bag of instances, is "
            "explained with make_explainable(model, unbatched=True), from inputs of shape "
            "(rows, ...)"
        )


def check_finite_outputs(output: Tensor, grad: Tensor) -> None:
    """Raise an OutputError if an output that is explained is NaN or infinite.

    Parameters
    ----------
    output : Tensor
        For rows ``[samples; references]``.
    grad : Tensor
        Cotangent of the rows of one half. It is nonzero for the outputs that are explained.
    """
    for role, rows in zip(("sample", "references"), output.chunk(2), strict=True):
        invalid = (~rows.isfinite() & (grad != 0)).flatten(1)
        if invalid.any():
            row, column = invalid.nonzero()[0].tolist()
            raise OutputError(
                f"output {column} of the {role} is NaN or infinite (row {row}), so there is no "
                "difference to attribute; choose outputs that are finite, such as logits, with "
                "make_explainable(model, output=...)"
            )
