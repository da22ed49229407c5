"""SHAP's sampling explainers for any function, with how much each is given.

A function takes an array of shape (rows, features) and returns one of shape (rows, outputs). Values
have the shape (samples, features, outputs) and are means over the background.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import shap
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.adapters import Explain, Inputs, join, split

Array = NDArray[Any]
Function = Callable[[Array], Array]
#: ``sampler(function, background, samples, evaluations)`` returns the values of the samples, from
#: so many coalitions of each.
Sampler = Callable[[Function, Array, Array, int], Array]


def permutation_values(f: Function, background: Array, x: Array, evaluations: int) -> Array:
    """Explain with PermutationExplainer, which takes every permutation in both directions."""
    masker = shap.maskers.Independent(background, max_samples=len(background))
    explainer = shap.PermutationExplainer(f, masker, seed=0)
    found = explainer(x, max_evals=evaluations, batch_size=256, silent=True).values
    return np.asarray(found).reshape(*x.shape, -1)


def kernel_values(f: Function, background: Array, x: Array, evaluations: int) -> Array:
    """Explain with KernelExplainer, without its selection of features."""
    explainer = shap.KernelExplainer(f, background)
    found = explainer.shap_values(x, nsamples=evaluations, l1_reg=False, silent=True)
    return np.asarray(found).reshape(*x.shape, -1)


def sampling_values(f: Function, background: Array, x: Array, evaluations: int) -> Array:
    """Explain with SamplingExplainer."""
    explainer = shap.SamplingExplainer(f, background)
    found = explainer.shap_values(x, nsamples=evaluations, silent=True)
    return np.asarray(found).reshape(*x.shape, -1)


SAMPLERS: dict[str, Sampler] = {
    "PermutationExplainer": permutation_values,
    "KernelExplainer": kernel_values,
    "SamplingExplainer": sampling_values,
}


def with_sampler(
    model: nn.Module, references: Inputs, outputs: int, *, sampler: Sampler, evaluations: int
) -> Explain:
    """Explain a network with a sampling explainer; see :mod:`benchmarks.adapters`."""
    shapes = [tuple(reference.shape[1:]) for reference in references]
    dtype = references[0].dtype

    @torch.no_grad()
    def function(rows: Array) -> Array:
        flat = torch.as_tensor(rows, dtype=dtype)
        output: torch.Tensor = model(*split(flat, shapes))
        return output.numpy()

    def explain(samples: Inputs) -> torch.Tensor:
        background, x = join(references).numpy(), join(samples).numpy()
        np.random.seed(0)
        return torch.from_numpy(sampler(function, background, x, evaluations))

    return explain
