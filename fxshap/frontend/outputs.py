"""Picking the tensor to explain from what a model returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fxshap.errors import OutputError

Selector = str | int | Callable[[Any], Tensor] | None


def select_output(result: Any, output: Selector) -> Tensor:
    """Return the floating-point tensor that `output` picks from a model's result.

    Parameters
    ----------
    result : Tensor, dict, dataclass or tuple
        What the model returned.
    output : str, int, callable or None
        A key or attribute name, an index, or a function of `result`.

    Raises
    ------
    OutputError
        If there is no such output, or it is not a floating-point tensor with rows.
    """
    picked = pick_output(result, output)
    if not isinstance(picked, Tensor):
        raise OutputError(
            f"the model returns {describe_result(picked)}, not one tensor; choose the tensor to "
            "explain with make_explainable(model, output=...), a key, an index or a function"
        )
    if not picked.is_floating_point():
        raise OutputError(
            f"the model returns a tensor of {picked.dtype}, which has no attributions; choose a "
            "floating-point output, such as the logits, with make_explainable(model, output=...)"
        )
    if picked.dim() == 0:
        check_two_dimensional(picked)
    return picked


def check_two_dimensional(result: Tensor) -> None:
    """Raise unless an output is of shape (rows, outputs), the only one that SHAP explains."""
    if result.dim() != 2:
        raise OutputError(
            f"the model returns a tensor of shape {tuple(result.shape)}; SHAP explains outputs of "
            "shape (rows, outputs). Reshape it with make_explainable(model, output=...), for "
            "example output=lambda y: y.reshape(len(y), -1)"
        )


def check_rows(result: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raise if the output has not one row for every row of the inputs."""
    rows = [len(x) for x in inputs if isinstance(x, Tensor) and x.dim() > 0]
    if any(len(result) != count for count in rows):
        raise OutputError(
            f"the model returns {len(result)} rows for inputs of {', '.join(map(str, rows))}; "
            "every row of the inputs (their first dimension) needs its own row of outputs"
        )


def check_finite_outputs(output: Tensor, grad: Tensor) -> None:
    """Raise if an output is NaN or infinite whose multipliers are asked for.

    Parameters
    ----------
    output : Tensor
        For rows ``[samples; references]``.
    grad : Tensor
        Cotangent of the rows of one half.
    """
    for what, end in zip(("sample", "references"), output.chunk(2), strict=True):
        wrong = (~end.isfinite() & (grad != 0)).flatten(1)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise OutputError(
                f"output {column} of the {what} is NaN or infinity (row {row}), so there is no "
                "difference to attribute; choose outputs that are finite, such as logits, with "
                "make_explainable(model, output=...)"
            )


def pick_output(result: Any, output: Selector) -> Any:
    """Apply a key, an attribute name, an index or a function.

    An index of a tensor is a column, as a class or a time step is, never a row.
    """
    if output is None:
        return result
    if callable(output):
        return output(result)
    try:
        if isinstance(output, str) and not isinstance(result, dict):
            return getattr(result, output)
        if isinstance(result, Tensor) and isinstance(output, int):
            picked = result[:, output]
            return picked.unsqueeze(1) if picked.dim() == 1 else picked
        return result[output]
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise OutputError(
            f"output={output!r} is not in the model's result, {describe_result(result)}"
        ) from error


def describe_result(result: Any) -> str:
    """Say what a result is, with its keys if it has any."""
    kind = type(result).__name__
    if isinstance(result, dict):
        return f"a {kind} with keys {list(result)}"
    if isinstance(result, tuple | list):
        return f"a {kind} of {len(result)} ({', '.join(type(item).__name__ for item in result)})"
    return f"a {kind} of shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {kind}"
