"""The property: through unmodified SHAP, attributions add up and the plain call is untouched."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import fxshap
from tests.fuzzing.conditioning import condition_number
from tests.fuzzing.networks import Data, Network
from tests.helpers import additivity_error, assert_no_shap_hooks, explain

LIMIT = 1e-9
#: A network that magnifies relative errors more than this is not asked for 1e-9.
WORST_CONDITION = 1e4


class Inexact(AssertionError):
    """The property does not hold."""


def check_exact(network: Network, datasets: list[Data]) -> list[str]:
    """Explain a network on several data; return what came of each.

    ``"exact"``, or why the property is not asked for: ``"ill-conditioned"`` where the network's
    own output has too few digits for it, ``"overflow"`` where it computes NaN or infinity,
    ``"zero"`` where all outputs are 0 and nothing can be relative to them.

    Raises
    ------
    Inexact
        If attributions do not add up, are not finite, or the plain call has changed.
    """
    model = network.build()
    explainable = fxshap.make_explainable(model)
    return [check_data(model, explainable, network, data) for data in datasets]


def check_data(
    model: torch.nn.Module, explainable: fxshap.ExplainableModule, network: Network, data: Data
) -> str:
    """Explain on one set of data."""
    samples, references = data.draw(network.inputs)
    both = [torch.cat(pair) for pair in zip(samples, references, strict=True)]
    with torch.no_grad():
        before = model(*both)
    scale = float(before.abs().max())
    if scale == 0:
        return "zero"
    condition, overflow = condition_number(model, samples, references)
    if overflow:
        return "overflow"
    if not condition <= WORST_CONDITION:
        return "ill-conditioned"
    # SHAP's own check has an absolute bound of 0.01.
    values = explain(explainable, references, samples, check_additivity=scale < 1e6)
    if not all(np.isfinite(phi).all() for phi in values):
        raise Inexact("the attributions are not finite")
    error = additivity_error(model, references, samples, values)
    if not error <= LIMIT:
        raise Inexact(f"additivity error {error:.1e} at a condition number of {condition:.1e}")
    require_plain(model, explainable, both, before)
    return "exact"


def require_plain(
    model: torch.nn.Module,
    explainable: fxshap.ExplainableModule,
    inputs: list[Tensor],
    before: Tensor,
) -> None:
    """Raise unless a plain call gives the model's own output, as before the explanation."""
    assert_no_shap_hooks(explainable)
    with torch.no_grad():
        if not torch.equal(model(*inputs), before):
            raise Inexact("the model's own output has changed")
        if not torch.equal(explainable(*inputs), before):
            raise Inexact("the plain output is not the model's own")
