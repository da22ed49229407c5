"""Whether SHAP's attributions of a model add up, and how near the exact Shapley values they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxshap.errors import OptionError
from fxshap.frontend.inputs import check_dtypes, check_matching_rows
from fxshap.frontend.outputs import Selector, check_two_dimensional
from fxshap.integrations.isolation import evaluation_mode
from fxshap.module import ExplainableModule, make_explainable
from fxshap.verification.leaks import find_leaks
from fxshap.verification.metrics import (
    Array,
    Heard,
    Inputs,
    additivity_gaps,
    as_list,
    distances_to_shapley,
    features_of,
    output_differences,
)
from fxshap.verification.result import SampleCheck, Verification


def verify(
    model: nn.Module,
    background: Inputs,
    samples: Inputs,
    *,
    output: Selector = None,
    ranked_outputs: int | None = None,
    feature_mask: Inputs | None = None,
    progress: bool = False,
) -> Verification:
    """Explain a model with unmodified SHAP and measure whether the attributions add up.

    Measured are, for every sample, the additivity error against SHAP's own tolerance and against
    the precision of the floats; the difference between the outputs that SHAP was given and the
    model's own; and, of up to 12 features or groups of them, the distance to the exact Shapley
    values. Where the attributions do not add up, the operations that leak are named.

    Parameters
    ----------
    model : nn.Module
        Any model, or what :func:`fxshap.make_explainable` returned, with its own options.
    background, samples : Tensor or sequence of Tensor
        What SHAP is given, of shape (rows, ...); one tensor an input.
    output : str, int or callable, optional
        Which output to explain, as :func:`fxshap.make_explainable` takes it.
    ranked_outputs : int, optional
        Explain only so many outputs of every sample, the largest; all by default. As in SHAP.
    feature_mask : Tensor or sequence of Tensor, optional
        One tensor an input, which broadcasts to the shape of one row: elements with the same
        number, in any input, are one feature, as in Captum. By default a feature is what
        `feature_dims` of :func:`fxshap.make_explainable` says: a pixel of an image, else one
        element.
    progress : bool
        Whether to show a progress bar on standard error.

    Returns
    -------
    Verification
        ``print`` it for the table.

    Raises
    ------
    FxshapError
        If the model cannot be explained: see ``docs/errors.md``.

    Notes
    -----
    An error is within the precision of the floats up to 1e-9 in float64, 1e-4 in float32, 0.05 in
    float16 and 0.2 in bfloat16, of the largest output; the type is the one with the fewest digits
    that the model computes in. The exact Shapley values take 2 ** features evaluations for
    every sample and reference (Lundberg and Lee 2017, eq. 4); samples after the first get theirs
    while that is less than 2 ** 18 in all.

    Examples
    --------
    >>> import torch, fxshap
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    >>> result = fxshap.verify(model, torch.randn(10, 4), torch.randn(3, 4))
    >>> result.additive, result.passes_shap
    (True, True)
    """
    if not isinstance(model, ExplainableModule):
        model = make_explainable(model, output=output)
    elif output is not None:
        raise OptionError("give output= to make_explainable, which made this model explainable")
    references, rows = as_list(background), as_list(samples)
    check_matching_rows(references, rows)
    groups = features_of(model, references, feature_mask)
    with evaluation_mode(model):
        check_dtypes(references, model.model, lambda: model(*references))
        with torch.no_grad():
            f_r = model(*references)
            check_two_dimensional(f_r)
            rows = [x.to(f_r.device) for x in rows]  # as SHAP does
            f_x = model(*rows)
        walks = len(f_x) * min(f_x.shape[1], ranked_outputs or f_x.shape[1])
        with _hearing(model, walks if progress else 0) as heard:
            values, ranks = shap_values(model, references, rows, ranked_outputs)
        scale = max(float(f_x.abs().max()), float(f_r.abs().max())) or 1.0
        gaps = additivity_gaps(values, f_x, f_r, ranks)
        differences = output_differences(heard, f_x, f_r)
        distances = distances_to_shapley(model, references, rows, values, ranks, groups)
        dtype = references[0].dtype
        checked = [
            SampleCheck(gap / scale, gap, difference / scale, distance)
            for gap, difference, distance in zip(
                map(float, gaps.max(1)), differences, distances, strict=True
            )
        ]
        result = Verification(
            model=type(model.model).__name__,
            dtype=dtype,
            computed_in=model.computed_in,
            references=len(f_r),
            features=int(groups.max()) + 1,
            samples=checked,
            values=values,
            leaks=[],
        )
        if result.additive:
            return result
        row, column = divmod(int(np.nan_to_num(gaps, nan=math.inf).argmax()), gaps.shape[1])
        sample = [x[row : row + 1] for x in rows]
        leaks = find_leaks(model.attribute, sample, references, int(ranks[row, column]), scale)
        return replace(result, leaks=leaks)


# --- what SHAP says -----------------------------------------------------------------------------


def shap_values(
    model: nn.Module,
    references: list[Tensor],
    samples: list[Tensor],
    ranked_outputs: int | None,
) -> tuple[list[Array], Tensor]:
    """Ask SHAP; return its values, one array an input, and the outputs that they explain.

    Returns
    -------
    list of ndarray
        Of shape (samples, ..., outputs).
    Tensor
        The columns of the model's output, of shape (samples, outputs).
    """
    import shap  # which takes seconds

    one = len(references) == 1
    explainer = shap.DeepExplainer(model, references[0] if one else references)
    found = explainer.shap_values(
        samples[0] if one else samples, ranked_outputs=ranked_outputs, check_additivity=False
    )
    found, ranks = (found, None) if ranked_outputs is None else found
    values = [found] if one else list(found)
    if ranks is None:
        ranks = torch.arange(values[0].shape[-1]).expand(len(values[0]), -1)
    return values, ranks.long().cpu()


@contextmanager
def _hearing(model: nn.Module, walks: int) -> Iterator[Heard]:
    """Collect what SHAP is given: the output of the sample and those of the references.

    A progress bar goes to standard error if the number of walks to come is not 0.
    """
    from tqdm import tqdm  # SHAP brings it

    heard: Heard = []
    bar = tqdm(desc="explaining", total=walks, disable=not walks, leave=False)

    def hear(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:  # it is asking for attributions
            rows = len(output) // 2
            heard.append((output[0].detach(), output[rows:].detach()))
            bar.update()

    handle = model.register_forward_hook(hear)
    try:
        yield heard
    finally:
        handle.remove()
        bar.close()


# --- the exact Shapley values -------------------------------------------------------------------
