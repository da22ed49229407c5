"""The property: through unmodified SHAP, attributions add up and the plain call is untouched."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

import fxshap
from fxshap.passes.insert_rescale import original_operator
from fxshap.report.report import Report
from tests.helpers import additivity_error, assert_no_shap_hooks, explain, rewritten
from tests.property.conditioning import condition_number, is_too_steep
from tests.property.networks import Data, Network

LIMIT = 1e-9
#: A network that magnifies relative errors more than this is not asked for 1e-9.
WORST_CONDITION = 1e4


class Inexact(AssertionError):
    """The property does not hold."""


def check_exact(network: Network, datasets: list[Data], variances: bool = False) -> list[str]:
    """Explain a network on several data, perhaps with variances; return what came of each.

    ``"exact"``, or why the property is not asked for: ``"ill-conditioned"`` where the network's
    own output has too few digits for it, ``"overflow"`` where it computes NaN or infinity or its
    steepest slope is no number, ``"zero"`` where all outputs are 0, or denormal, and nothing can be
    relative to them.

    Raises
    ------
    Inexact
        If attributions do not add up, are not finite, the plain call has changed, or the report
        leaves out an operation that was rewritten.
    """
    model = network.build()
    explainable = fxshap.make_explainable(model, variances=variances)
    outcomes = [check_data(model, explainable, network, data) for data in datasets]
    if "exact" in outcomes:
        require_every_node(explainable)
    return outcomes


def check_data(
    model: torch.nn.Module, explainable: fxshap.ExplainableModule, network: Network, data: Data
) -> str:
    """Explain on one set of data."""
    samples, references = data.draw(network.inputs)
    both = [torch.cat(pair) for pair in zip(samples, references, strict=True)]
    with torch.no_grad():
        before = model(*both)
    scale = float(before.abs().max())
    if scale < torch.finfo(before.dtype).tiny:
        return "zero"
    condition, overflow = condition_number(model, samples, references)
    if overflow or is_too_steep(before, both, len(samples[0])):
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


def require_every_node(explainable: fxshap.ExplainableModule) -> None:
    """Raise unless the report counts every node that was rewritten, by its own operator."""
    nodes = Counter(str(original_operator(node)) for node in rewritten(explainable))
    report: Report = explainable.report()
    named = Counter[str]()
    for entry in report.entries:
        if entry.treatment in ("closed", "generic"):
            named[entry.operation] += entry.nodes
    if named != nodes:
        raise Inexact(f"the report names {named}, but rewritten were {nodes}")
