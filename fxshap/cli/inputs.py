"""Random inputs for ``fxshap check``, from the shapes and dtypes on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxshap.cli.options import InputSpec
from fxshap.frontend.signature import signature
from fxshap.module import ExplainableModule, make_explainable


def draw_input(spec: InputSpec, rows: int, dtype: torch.dtype, largest: int) -> Tensor:
    """Return random rows: standard normal numbers, integers below a limit, or ones.

    Parameters
    ----------
    spec : InputSpec
    rows : int
    dtype : torch.dtype
        The dtype of inputs that have none.
    largest : int
        Integers are drawn below it.
    """
    size, own = (rows, *spec.shape), getattr(torch, spec.dtype or "", dtype)
    if spec.explained:
        return torch.randn(size).to(own)
    if own is torch.bool:
        return torch.ones(size, dtype=torch.bool)
    return torch.randint(largest, size, dtype=own)


def bound_value(value: Any) -> Any:
    """Return the value of a bound argument: the tensor of a file, or the value itself."""
    return torch.from_numpy(np.load(value)) if isinstance(value, Path) else value


def convert_weights(model: nn.Module, dtype: str) -> tuple[nn.Module, torch.dtype]:
    """Convert the weights of a model; return the model and the dtype of its inputs.

    NumPy has no bfloat16, so a model with such weights takes and returns float32.
    """
    model = model.to(getattr(torch, dtype))
    if dtype != "bfloat16":
        return model, getattr(torch, dtype)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: cast_all((args, kwargs), torch.float32, torch.bfloat16),
        with_kwargs=True,
    )
    model.register_forward_hook(
        lambda module, args, output: cast_all(output, torch.bfloat16, torch.float32)
    )
    return model, torch.float32


def cast_all(values: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """Cast all tensors of one dtype in nested values to another."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(target) if x.dtype is source else x, values)


def explainable_with_inputs(
    model: nn.Module,
    specs: Sequence[InputSpec],
    count: tuple[int, int],
    dtype: torch.dtype,
    largest: int,
    layer: str | None,
    forward_kwargs: Mapping[str, Any],
    **options: Any,
) -> tuple[ExplainableModule, list[Tensor], list[Tensor]]:
    """Return the explainable model, the references and the samples.

    Integers are bound, with the row of the first sample. With a layer, all inputs are, and what the
    layer returns for them is explained.

    Parameters
    ----------
    model : nn.Module
    specs : sequence of InputSpec
    count : (int, int)
        The number of references and of samples.
    dtype : torch.dtype
        The dtype of floating-point inputs.
    largest : int
        Integers are drawn below it.
    layer : str, optional
    forward_kwargs : mapping
        Other arguments of the model.
    **options
        Those of :func:`fxshap.make_explainable`.
    """
    references, samples = count
    bound = {name: bound_value(value) for name, value in forward_kwargs.items()}
    names = (name for name in signature(model).parameters if name not in bound)
    rows = {
        spec.name or next(names): draw_input(spec, references + samples, dtype, largest)
        for spec in specs
    }
    if layer is not None:
        explainable = make_explainable(model, layer=layer, forward_kwargs=bound, **options)
        parts = [
            explainable.prefix(**{name: x[part] for name, x in rows.items()})
            for part in (slice(references), slice(references, None))
        ]
        explainable = explainable.bind(**{name: x[references:] for name, x in rows.items()})
        background, explained = ([x] if isinstance(x, Tensor) else list(x) for x in parts)
        return explainable, background, explained
    floating = {name: x for name, x in rows.items() if x.is_floating_point()}
    others = {
        name: x[references : references + 1] for name, x in rows.items() if name not in floating
    }
    chosen = list(floating) if any(spec.name for spec in specs) else None
    explainable = make_explainable(
        model, input_names=chosen, forward_kwargs={**others, **bound}, **options
    )
    return (
        explainable,
        [x[:references] for x in floating.values()],
        [x[references:] for x in floating.values()],
    )
