"""Distance of attributions from additivity, and from the exact Shapley values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fxshap.frontend.arguments import Call
from fxshap.frontend.outputs import as_columns
from fxshap.module import ExplainableModule
from fxshap.runtime.features import count_features, feature_numbers
from fxshap.runtime.shapley import shapley_values_of_pairs

Inputs = Tensor | Sequence[Tensor]
Array = npt.NDArray[Any]

#: For every backward pass of SHAP, the output of the sample and those of the references.
OutputPairs = list[tuple[Tensor, Tensor]]

#: The most features, or groups of features, for which exact Shapley values are computed.
MAX_FEATURES = 12

#: The most rows of the model to evaluate for exact Shapley values. The first sample gets its exact
#: values even if they take more.
MAX_ROWS = 2**18

#: How many rows of them are evaluated together.
BATCH_SIZE = 4096


def as_list(inputs: Inputs) -> list[Tensor]:
    """Return the inputs as a list; a single tensor becomes a list of one."""
    return [inputs] if isinstance(inputs, Tensor) else list(inputs)


def flatten_features(phi: Array) -> Array:
    """Return SHAP values as float64, of shape (samples, elements, outputs)."""
    return phi.astype(np.float64).reshape(len(phi), -1, phi.shape[-1])


# --- additivity ---------------------------------------------------------------------------------


def output_differences(recorded: OutputPairs, f_x: Tensor, f_r: Tensor) -> list[float]:
    """Return, for every sample, how far the outputs that SHAP received are from the model's.

    Parameters
    ----------
    recorded : list of (Tensor, Tensor)
        The outputs that SHAP received in each of its backward passes.
    f_x, f_r : Tensor
        The model's own outputs at the samples and at the references.
    """
    largest = [0.0] * len(f_x)
    for index, (y_x, y_r) in enumerate(recorded):
        row = index % len(f_x)  # SHAP explains all samples for one output, then for the next
        difference = max(float((y_x - f_x[row]).abs().max()), float((y_r - f_r).abs().max()))
        largest[row] = max(largest[row], difference)
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
        One tensor for each input, of shape (rows, ...).
    values : sequence of ndarray
        One array for each input, of shape (samples, ..., outputs), the layout of SHAP.

    Returns
    -------
    float
        The largest ``|sum(phi) - (f(x) - mean f(background))|`` over the largest ``|f|``.
    """
    f_x, f_r = (explained_output(model, as_list(x)) for x in (samples, background))
    all_columns = torch.arange(f_x.shape[1]).expand(len(f_x), -1)
    gap = additivity_gaps(values, f_x, f_r, all_columns).max()
    return float(gap) / max(float(f_x.abs().max()), float(f_r.abs().max()))


def additivity_gaps(values: Sequence[Array], f_x: Tensor, f_r: Tensor, ranks: Tensor) -> Array:
    """Return |sum(phi) - (f(x) - mean f(references))|, of shape (samples, outputs), in float64.

    Parameters
    ----------
    values : list of ndarray
        SHAP's values, one array for each input, of shape (samples, ..., outputs).
    f_x, f_r : Tensor
        The model's outputs at the samples and at the references.
    ranks : Tensor
        The columns of the output that the values explain, of shape (samples, outputs).
    """
    total = sum(flatten_features(phi).sum(1) for phi in values)
    change = f_x.double().cpu() - f_r.double().cpu().mean(0)
    gaps: Array = np.abs(total - change.gather(1, ranks).numpy())
    return gaps


@torch.no_grad()
def explained_output(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """Return the output that is explained, of shape (rows, outputs)."""
    if isinstance(model, ExplainableModule):
        return model._calls.explained_output(Call.of(inputs, {}))
    output: Tensor = as_columns(model(*inputs))
    return output


# --- exact Shapley values -----------------------------------------------------------------------


def verified_features(
    model: ExplainableModule, inputs: list[Tensor], feature_mask: Inputs | None
) -> list[Tensor]:
    """Return the number of the feature that each element belongs to, one tensor per input.

    Parameters
    ----------
    model : ExplainableModule
        Its own features count if there is no `feature_mask`.
    inputs : list of Tensor
        One tensor for each input, of shape (rows, ...).
    feature_mask : Tensor or sequence of Tensor, optional
        As :func:`fxshap.verify` takes it.

    Raises
    ------
    OptionError
        If `feature_mask` has another number of tensors than there are inputs, or does not
        broadcast to the shape of a row.
    """
    if feature_mask is not None:
        return feature_numbers(inputs, feature_mask=feature_mask)
    return model._calls.options.refinement.features(inputs)


def exact_values(
    model: nn.Module, references: list[Tensor], samples: list[Tensor], numbers: list[Tensor]
) -> list[Tensor | None]:
    """Return for every sample the exact Shapley values, float64 of shape (features, outputs).

    Parameters
    ----------
    model : nn.Module
        The explained model, with an output of shape (rows, outputs).
    references, samples : list of Tensor
        One tensor for each input, of shape (rows, ...).
    numbers : list of Tensor
        The number of the feature of every element, as :func:`verified_features` returns it.

    Returns
    -------
    list of Tensor or None
        ``None`` for a sample whose exact values would take too long.
    """
    features = count_features(numbers)
    rows_per_sample = 2**features * len(references[0])
    computed = 0 if features > MAX_FEATURES else max(1, MAX_ROWS // rows_per_sample)
    everyone = torch.ones(len(references[0]), features, dtype=torch.bool)
    exact: list[Tensor | None] = [None] * len(samples[0])
    for row in range(min(computed, len(samples[0]))):
        games = shapley_values_of_pairs(
            lambda points: explained_output(model, points),
            [x[row : row + 1] for x in samples],
            references,
            numbers,
            everyone,
            BATCH_SIZE,
        )
        exact[row] = games.mean(0)
    return exact


def shapley_distances(
    exact: Sequence[Tensor | None],
    values: list[Array],
    ranks: Tensor,
    numbers: list[Tensor],
    scale: float,
) -> list[float | None]:
    """Return for every sample sum |phi - exact| / sum |exact|.

    Parameters
    ----------
    exact : sequence of Tensor or None
        The exact values of every sample, of shape (features, outputs).
    values : list of ndarray
        SHAP's values, one array for each input, of shape (samples, ..., outputs).
    ranks : Tensor
        The columns of the output that the values explain, of shape (samples, outputs).
    numbers : list of Tensor
        The number of the feature of every element, as :func:`verified_features` returns it.
    scale : float
        The largest absolute output. Differences that are within its rounding are no distance: the
        exact values of a sample that is its own reference are 0.

    Returns
    -------
    list of float or None
        ``None`` for a sample without exact values.
    """
    features, outputs = count_features(numbers), values[0].shape[-1]
    by_feature = torch.zeros(len(values[0]), features, outputs, dtype=torch.float64)
    for value, number in zip(values, numbers, strict=True):
        groups = number.expand(1, *value.shape[1:-1]).flatten()
        by_feature.index_add_(1, groups, torch.from_numpy(flatten_features(value)))
    rounding = float(np.finfo(values[0].dtype).eps) * scale * features * outputs
    distances: list[float | None] = []
    for phi, best, columns in zip(by_feature, exact, ranks, strict=True):
        if best is None:
            distances.append(None)
            continue
        error = float((phi - best[:, columns]).abs().sum())
        size = float(best[:, columns].abs().sum())
        distances.append(0.0 if error <= rounding else error / size if size else math.inf)
    return distances
