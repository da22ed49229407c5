"""How far attributions are from adding up, and from the exact Shapley values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fxshap.errors import OptionError
from fxshap.module import ExplainableModule
from fxshap.runtime.coalitions import dims_of_inputs
from fxshap.verification.shapley import shapley_values


def output_differences(heard: Heard, f_x: Tensor, f_r: Tensor) -> list[float]:
    """Return, for every sample, how far the outputs that SHAP was given are from the model's."""
    largest = [0.0] * len(f_x)
    for call, (y_x, y_r) in enumerate(heard):
        row = call % len(f_x)  # SHAP goes through all samples for one output after the other
        found = max(float((y_x - f_x[row]).abs().max()), float((y_r - f_r).abs().max()))
        largest[row] = max(largest[row], found)
    return largest


def additivity_error(
    model: nn.Module, background: Inputs, samples: Inputs, values: Sequence[Array]
) -> float:
    """Return how far attributions are from summing to the change of a model's output.

    Parameters
    ----------
    model : nn.Module
        The explained model, with an output of shape (rows, outputs).
    background, samples : Tensor or sequence of Tensor
        One tensor an input, of shape (rows, ...).
    values : sequence of ndarray
        One array an input, of shape (samples, ..., outputs), the layout of SHAP.

    Returns
    -------
    float
        The largest ``|sum(phi) - (f(x) - mean f(background))|`` over the largest ``|f|``.
    """
    with torch.no_grad():
        f_x, f_r = model(*as_list(samples)), model(*as_list(background))
    every = torch.arange(f_x.shape[1]).expand(len(f_x), -1)
    gap = additivity_gaps(values, f_x, f_r, every).max()
    return float(gap) / max(float(f_x.abs().max()), float(f_r.abs().max()))


def additivity_gaps(values: Sequence[Array], f_x: Tensor, f_r: Tensor, ranks: Tensor) -> Array:
    """Return |sum(phi) - (f(x) - mean f(references))|, of shape (samples, outputs), in float64.

    Parameters
    ----------
    values : list of ndarray
        SHAP's values, one array an input, of shape (samples, ..., outputs).
    f_x, f_r : Tensor
        The model's outputs at the samples and at the references.
    ranks : Tensor
        The columns of the output that the values explain, of shape (samples, outputs).
    """
    total = sum(flat(phi).sum(1) for phi in values)
    change = f_x.double().cpu() - f_r.double().cpu().mean(0)
    gaps: Array = np.abs(total - change.gather(1, ranks).numpy())
    return gaps


def flat(phi: Array) -> Array:
    """Return SHAP values as float64, of shape (samples, elements, outputs)."""
    return phi.astype(np.float64).reshape(len(phi), -1, phi.shape[-1])


def features_of(
    model: ExplainableModule, inputs: list[Tensor], feature_mask: Inputs | None
) -> Tensor:
    """Return the number of the feature that each element of all inputs belongs to, from 0."""
    if feature_mask is not None:
        masks = as_list(feature_mask)
    else:
        dims = dims_of_inputs(inputs, model.refinement.feature_dims)
        masks = []
        for x, keep in zip(inputs, dims, strict=True):
            shape = [x.shape[d] if d in keep else 1 for d in range(1, x.dim())]
            first = sum(mask.numel() for mask in masks)
            masks.append(first + torch.arange(math.prod(shape)).reshape(shape))
    if len(masks) != len(inputs):
        raise OptionError(
            f"feature_mask describes {len(masks)} inputs, but the model has {len(inputs)}"
        )
    try:
        whole = [mask.expand(1, *x.shape[1:]) for mask, x in zip(masks, inputs, strict=True)]
    except RuntimeError as error:
        shapes = [tuple(mask.shape) for mask in masks]
        raise OptionError(
            f"feature_mask, of shape {shapes}, does not broadcast to the shape of one row of the "
            f"inputs, {[tuple(x.shape[1:]) for x in inputs]}"
        ) from error
    numbers: Tensor = torch.cat([mask.flatten() for mask in whole]).unique(return_inverse=True)[1]
    return numbers


def distances_to_shapley(
    model: nn.Module,
    references: list[Tensor],
    samples: list[Tensor],
    values: list[Array],
    ranks: Tensor,
    groups: Tensor,
) -> list[float | None]:
    """Return for every sample sum |phi - exact| / sum |exact|; ``None`` where it takes too long."""
    shapes = [x.shape[1:] for x in samples]
    sizes = [math.prod(shape) for shape in shapes]
    features = int(groups.max()) + 1
    rows = 2**features * len(references[0])
    most = 0 if features > MAX_FEATURES else max(1, MAX_ROWS // rows)

    def function(points: Tensor) -> Tensor:
        parts = zip(points.split(sizes, 1), shapes, strict=True)
        result: Tensor = model(*[part.reshape(-1, *shape) for part, shape in parts])
        return result

    phi = torch.from_numpy(np.concatenate([flat(value) for value in values], 1))
    total = torch.zeros(len(phi), features, phi.shape[-1], dtype=torch.float64)
    total.index_add_(1, groups, phi)
    points = torch.cat([x.flatten(1) for x in samples], 1)
    ends = torch.cat([r.flatten(1) for r in references], 1)
    distances: list[float | None] = []
    for row, point in enumerate(points):
        if row >= most:
            distances.append(None)
            continue
        games = [shapley_values(function, point, end, groups) for end in ends]
        exact = torch.stack(games).mean(0)[:, ranks[row]]
        distances.append(float((total[row] - exact).abs().sum() / exact.abs().sum()))
    return distances


Inputs = Tensor | Sequence[Tensor]


Array = npt.NDArray[Any]


def as_list(inputs: Inputs) -> list[Tensor]:
    """Return a list of one, or of all inputs."""
    return [inputs] if isinstance(inputs, Tensor) else list(inputs)


#: Features, or groups of them, up to which the exact Shapley values are computed.
MAX_FEATURES = 12


#: Rows of the model to spend on them; one sample gets its exact values whatever they take.
MAX_ROWS = 2**18


Heard = list[tuple[Tensor, Tensor]]
