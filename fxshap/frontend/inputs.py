"""What inputs must be, and what is said when they are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.errors import InputError, WeightError


def is_floating(value: Any) -> bool:
    """Say whether a value is a floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def check_floating(inputs: Sequence[Tensor]) -> None:
    """Raise unless all inputs are floating-point tensors."""
    for position, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise InputError(f"input {position} is a {type(x).__name__}, not a torch.Tensor")
        if not x.is_floating_point():
            raise InputError(
                f"input {position} is of {x.dtype}; only floating-point inputs have attributions. "
                "Cast features with .float(), bind what is not to be explained "
                "(explainable.bind), and explain token ids from their embeddings "
                "(explainable.from_layer)"
            )


def check_matching_rows(references: Sequence[Any], samples: Sequence[Any]) -> None:
    """Raise unless references and samples are tensors with rows of the same shapes."""
    for what, inputs in (("background", references), ("samples", samples)):
        for position, x in enumerate(inputs):
            if not isinstance(x, Tensor):
                raise InputError(
                    f"input {position} of the {what} is a {type(x).__name__}, not a torch.Tensor "
                    "(torch.from_numpy makes one)"
                )
            if x.dim() == 0 or len(x) == 0:
                raise InputError(f"input {position} of the {what} has no rows")
    if len(references) != len(samples):
        raise InputError(
            f"the background is of {len(references)} inputs, but the samples of {len(samples)}"
        )
    for position, (r, x) in enumerate(zip(references, samples, strict=True)):
        if r.shape[1:] != x.shape[1:]:
            raise InputError(
                f"rows of input {position} are of shape {tuple(r.shape[1:])} in the background, "
                f"but {tuple(x.shape[1:])} in the samples; the first dimension counts the rows"
            )


@torch.no_grad()
def check_dtypes(inputs: Sequence[Tensor], model: nn.Module, call: Callable[[], Any]) -> None:
    """Raise if inputs are not of the type of the model's weights and the model fails on them."""
    wanted = {p.dtype for p in model.parameters() if p.is_floating_point()}
    found = {x.dtype for x in inputs}
    if len(wanted) != 1 or not found or found & wanted:
        return
    try:
        call()
    except RuntimeError as error:
        raise InputError(
            f"the inputs are of {found.pop()} but the model's weights of {wanted.pop()}; cast "
            "samples and background to the dtype of the model"
        ) from error


def check_numpy_dtypes(inputs: Sequence[Tensor], output: Tensor) -> None:
    """Raise if SHAP cannot make NumPy arrays of the inputs or the output."""
    if any(x.dtype is torch.bfloat16 for x in (*inputs, output)):
        raise InputError(
            "SHAP makes NumPy arrays of the inputs and the output, and NumPy has no bfloat16; "
            "explain a small nn.Module around the model whose forward takes float32 and returns "
            "it: `return self.model(x.bfloat16()).float()`"
        )


def check_finite(what: str, inputs: Sequence[Tensor]) -> None:
    """Raise if samples or references contain NaN or infinity."""
    for position, x in enumerate(inputs):
        if not x.isfinite().all():
            row = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
            raise InputError(
                f"input {position} of the {what} contains NaN or infinity (row {row}), from which "
                "there is no difference to attribute; fill in or leave out such rows"
            )


def check_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Raise if a weight contains NaN, or infinity where it is a parameter.

    Parameters
    ----------
    weights : mapping of str to Tensor
        By their qualified names. Infinity in a buffer may be a mask.
    """
    for name, weight in weights.items():
        infinity = isinstance(weight, nn.Parameter) and bool(weight.isinf().any())
        if infinity or bool(weight.isnan().any()):
            what = "infinity" if infinity else "NaN"
            raise WeightError(
                f"the weight {name!r} contains {what}, from which no attribution can be had; load "
                "or train the model again"
            )
