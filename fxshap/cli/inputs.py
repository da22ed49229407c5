"""Random inputs for ``fxshap check``, from the shapes and dtypes on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor, nn

from fxshap.frontend.signature import signature
from fxshap.module import ExplainableModule, make_explainable

#: Dtypes of weights and of explained inputs: those that NumPy has, as SHAP converts to it.
FLOATING = {name: getattr(torch, name) for name in ("float16", "float32", "float64")}
#: Dtypes of inputs that are not explained.
INTEGERS = {name: getattr(torch, name) for name in ("int32", "int64", "bool")}


@dataclass(frozen=True)
class InputSpec:
    """An input of the model: its shape without the rows, and what is known of it.

    Attributes
    ----------
    shape : tuple of int
    name : str, optional
        The parameter of ``forward``; by default the next one.
    dtype : torch.dtype, optional
        By default that of the weights.
    """

    shape: tuple[int, ...]
    name: str | None = None
    dtype: torch.dtype | None = None

    @property
    def explained(self) -> bool:
        """Whether the input is floating point."""
        return self.dtype is None or self.dtype.is_floating_point

    def draw(self, rows: int, dtype: torch.dtype, largest: int) -> Tensor:
        """Return random rows: standard normal numbers, integers below a limit, or ones."""
        size = (rows, *self.shape)
        if self.explained:
            return torch.randn(size).to(self.dtype or dtype)
        if self.dtype == torch.bool:
            return torch.ones(size, dtype=torch.bool)
        return torch.randint(largest, size, dtype=self.dtype)


def parse_shape(shape: str) -> tuple[int, ...]:
    """Return the shape of one row of an input, given as ``3,224,224``."""
    sizes = shape.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"{shape!r} is not like 3,224,224")
    return tuple(map(int, sizes))


def parse_input(text: str) -> InputSpec:
    """Return an input, given as ``name=3,224,224`` or ``name=int64:16``."""
    name, equals, rest = text.partition("=")
    dtype, colon, shape = rest.rpartition(":")
    dtypes = FLOATING | INTEGERS
    if not (name.isidentifier() and equals) or (colon and dtype not in dtypes):
        raise click.BadParameter(
            f"{text!r} is not like name=3,224,224 or name=int64:16; dtypes are {', '.join(dtypes)}"
        )
    return InputSpec(parse_shape(shape), name, dtypes[dtype] if colon else None)


def explainable_with_inputs(
    model: nn.Module,
    specs: Sequence[InputSpec],
    count: tuple[int, int],
    dtype: torch.dtype,
    largest: int,
    layer: str | None,
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
        The dtype of the weights.
    largest : int
        Integers are drawn below it.
    layer : str, optional
    **options
        Those of :func:`fxshap.make_explainable`.
    """
    references, samples = count
    names = iter(signature(model).parameters)
    rows = {
        spec.name or next(names): spec.draw(references + samples, dtype, largest) for spec in specs
    }
    if layer is not None:
        explainable = make_explainable(model, layer=layer, **options)
        parts = [
            explainable.prefix(**{name: x[part] for name, x in rows.items()})
            for part in (slice(references), slice(references, None))
        ]
        bound = explainable.bind(**{name: x[references:] for name, x in rows.items()})
        background, explained = ([x] if isinstance(x, Tensor) else list(x) for x in parts)
        return bound, background, explained
    floating = {name: x for name, x in rows.items() if x.is_floating_point()}
    others = {
        name: x[references : references + 1] for name, x in rows.items() if name not in floating
    }
    chosen = list(floating) if any(spec.name for spec in specs) else None
    explainable = make_explainable(model, input_names=chosen, forward_kwargs=others, **options)
    return (
        explainable,
        [x[:references] for x in floating.values()],
        [x[references:] for x in floating.values()],
    )
