"""fxshap explains all networks that stock SHAP can, with SHAP's values where they are right."""

from __future__ import annotations

import warnings

import numpy as np
import shap
import torch
from shap.explainers._deep.deep_pytorch import op_handler

import fxshap
from fxshap.verification.metrics import additivity_error
from tests.property.supported_modules import (
    BEFORE,
    FLATTENED,
    HIDDEN,
    OUTPUTS,
    PASSING,
    SHAPES,
    WRITTEN,
    Drawn,
)

#: The networks that are drawn: they have every module and every habit.
SEEDS = range(214, 244)

#: Additivity error, and distance of values, that float32 allows.
EXACT, CLOSE = 1e-5, 1e-4

#: Modules whose rule differs: the softmax of stock SHAP is elementwise, and its pools match maxima.
OTHER_RULES = {"Softmax", "MaxPool1d", "MaxPool2d", "MaxPool3d"}


#: Supported modules that no network here has; they pass values on, as the other dropouts do.
NOT_DRAWN = {"Dropout2d", "Dropout3d"}


def explain(model, references, samples):
    """Return SHAP's values without its check, as one array."""
    return shap.DeepExplainer(model, references).shap_values(samples, check_additivity=False)


def explain_or_none(model, references, samples):
    """Return the values of a stock explanation; None if it raises."""
    try:
        return explain(model, references, samples)
    except Exception:
        return None


def test_networks_of_supported_modules_are_explained():
    compared = 0
    for seed in SEEDS:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            model = Drawn(seed)
            shape = SHAPES[model.dims]
            references, samples = torch.randn(4, *shape), torch.randn(2, *shape)
            stock = explain_or_none(Drawn(seed), references, samples)
            values = explain(fxshap.make_explainable(model, progress=False), references, samples)
        error = additivity_error(model, references, samples, [values])
        assert error <= EXACT, (seed, model)
        if stock is None or model.names & OTHER_RULES:
            continue
        if additivity_error(model, references, samples, [stock]) <= EXACT:
            compared += 1
            distance = np.abs(stock - values).max()
            assert distance <= CLOSE * max(np.abs(values).max(), 1e-3), (seed, model)
    assert compared >= len(SEEDS) // 5


def test_every_module_that_shap_supports_and_every_habit_is_drawn():
    names = set().union(*(Drawn(seed).names for seed in SEEDS)) | {"Linear", "Flatten"}
    habits = {*WRITTEN, *PASSING, *FLATTENED, *BEFORE, *HIDDEN, *OUTPUTS}
    assert not {*op_handler, *habits} - names - NOT_DRAWN
