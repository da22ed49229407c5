"""Check that SHAP's attributions of a model add up, and compare them with exact Shapley values."""

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
from fxshap.frontend.inputs import check_compatible, check_matching_rows
from fxshap.frontend.outputs import Selector, check_two_dimensional
from fxshap.integrations.isolation import evaluation_mode
from fxshap.module import ExplainableModule, make_explainable
from fxshap.runtime.captures import CaptureCache
from fxshap.runtime.features import count_features
from fxshap.verification.leaks import Leak, find_leaks
from fxshap.verification.metrics import (
    Array,
    Inputs,
    OutputPairs,
    additivity_gaps,
    as_list,
    exact_values,
    explained_output,
    output_differences,
    shapley_distances,
    verified_features,
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

    For every sample it measures the additivity error, which it compares with SHAP's own tolerance
    and with the precision of the floats; the difference between the outputs that SHAP received and
    the model's own; and, for up to 12 features or groups of features, the distance to the exact
    Shapley values. If the attributions do not add up, it names the operations that leak. If they
    add up but are far from the exact values, it measures how near other options come.

    Parameters
    ----------
    model : nn.Module
        Any model, or the result of :func:`fxshap.make_explainable`, which has its own options.
    background, samples : Tensor or sequence of Tensor
        The arguments for SHAP, of shape (rows, ...); one tensor for each input.
    output : str, int or callable, optional
        The output to explain, as :func:`fxshap.make_explainable` takes it.
    ranked_outputs : int, optional
        Explain only this many outputs of every sample, the largest; all by default. As in SHAP.
    feature_mask : Tensor or sequence of Tensor, optional
        One tensor for each input, which broadcasts to the shape of one row: elements with the same
        number, in any input, are one feature, as in Captum. By default a feature is what
        `feature_dims` of :class:`fxshap.Refinement` defines: a pixel of an image, otherwise one
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
    float16 and 0.2 in bfloat16, of the largest output. The dtype is the least precise one that the
    model computes in. The exact Shapley values take 2 ** features evaluations for every sample and
    reference (Lundberg and Lee 2017, eq. 4). They are computed for the first sample, and for
    further samples up to 2 ** 18 evaluations in total.

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
    numbers = verified_features(model, references, feature_mask)
    with evaluation_mode(model):
        check_compatible(references, model.original_model, lambda: model(*references))
        f_r = explained_output(model, references)
        check_two_dimensional(f_r)
        rows = [x.to(f_r.device) for x in rows]  # as SHAP does
        f_x = explained_output(model, rows)
        backward_passes = len(f_x) * min(f_x.shape[1], ranked_outputs or f_x.shape[1])
        with record_outputs(model, backward_passes if progress else 0) as recorded:
            values, ranks = shap_values(model, references, rows, ranked_outputs)
        scale = max(float(f_x.abs().max()), float(f_r.abs().max())) or 1.0
        gaps = additivity_gaps(values, f_x, f_r, ranks)
        exact = exact_values(model, references, rows, numbers)
        measured = zip(
            map(float, gaps.max(1)),
            output_differences(recorded, f_x, f_r),
            shapley_distances(exact, values, ranks, numbers, scale),
            strict=True,
        )
        result = Verification(
            model=type(model.original_model).__name__,
            dtype=references[0].dtype,
            compute_dtype=model.compute_dtype,
            references=len(f_r),
            features=count_features(numbers),
            samples=[SampleCheck(g / scale, g, d / scale, distance) for g, d, distance in measured],
            values=values,
            leaks=[],
        )
        if not result.additive:
            leaks = leaks_of_largest_gap(model, references, rows, gaps, ranks, scale)
            result = replace(result, leaks=leaks)
        elif result.near_shapley is False:
            row = result.farthest
            sample = [x[row : row + 1] for x in rows]

            def distance(variant: ExplainableModule) -> float:
                values, ranks = shap_values(variant, references, sample, ranked_outputs)
                (measured,) = shapley_distances(exact[row : row + 1], values, ranks, numbers, scale)
                return math.nan if measured is None else measured

            variants = other_options(model, feature_mask)
            result = replace(result, alternatives={n: distance(v) for n, v in variants.items()})
    return result


def other_options(
    model: ExplainableModule, feature_mask: Inputs | None
) -> dict[str, ExplainableModule]:
    """Return the model with the options that may come nearer to the exact Shapley values."""
    options = model._calls.options
    refinement = replace(options.refinement, coalitions=8, budget=None, max_groups=None)
    if feature_mask is not None:
        refinement = replace(refinement, feature_mask=feature_mask, feature_dims=None)
    changed = {
        "rule='variance'": replace(options, rule="variance", compile=False),
        "refine=8": replace(options, refinement=refinement, compile=False),
    }
    calls = model._calls
    return {
        name: ExplainableModule(replace(calls, options=o, captures=CaptureCache(calls.model)))
        for name, o in changed.items()
        if o != replace(options, compile=False)
    }


def leaks_of_largest_gap(
    model: ExplainableModule,
    references: list[Tensor],
    samples: list[Tensor],
    gaps: Array,
    ranks: Tensor,
    scale: float,
) -> list[Leak]:
    """Return the operations that leak for the sample and the output with the largest gap."""
    largest = int(np.nan_to_num(gaps, nan=math.inf).argmax())
    row, column = divmod(largest, gaps.shape[1])
    sample = [x[row : row + 1] for x in samples]
    return find_leaks(model.rescaled_graph, sample, references, int(ranks[row, column]), scale)


# --- calling SHAP -------------------------------------------------------------------------------


def shap_values(
    model: nn.Module,
    references: list[Tensor],
    samples: list[Tensor],
    ranked_outputs: int | None,
) -> tuple[list[Array], Tensor]:
    """Return SHAP's values and the outputs that they explain.

    Returns
    -------
    list of ndarray
        One array for each input, of shape (samples, ..., outputs).
    Tensor
        The columns of the model's output, of shape (samples, outputs).
    """
    import shap  # imported here because it takes seconds

    single = len(references) == 1
    explainer = shap.DeepExplainer(model, references[0] if single else references)
    result = explainer.shap_values(
        samples[0] if single else samples, ranked_outputs=ranked_outputs, check_additivity=False
    )
    result, ranks = (result, None) if ranked_outputs is None else result
    values = [result] if single else list(result)
    if ranks is None:
        ranks = torch.arange(values[0].shape[-1]).expand(len(values[0]), -1)
    return values, ranks.long().cpu()


@contextmanager
def record_outputs(model: nn.Module, backward_passes: int) -> Iterator[OutputPairs]:
    """Record the outputs that SHAP receives: that of the sample and those of the references.

    Parameters
    ----------
    model : nn.Module
        The explainable model.
    backward_passes : int
        The length of the progress bar on standard error; 0 shows none.
    """
    from tqdm import tqdm  # a dependency of SHAP

    recorded: OutputPairs = []
    bar = tqdm(desc="explaining", total=backward_passes, disable=not backward_passes, leave=False)

    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:  # this call is for attributions
            rows = len(output) // 2
            recorded.append((output[0].detach(), output[rows:].detach()))
            bar.update()

    handle = model.register_forward_hook(record)
    try:
        yield recorded
    finally:
        handle.remove()
        bar.close()
