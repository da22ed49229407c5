"""The property: by unmodified SHAP, attributions add up, and the plain call stays the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

import fxshap
from fxshap.passes.insert_rescale import original_operator
from fxshap.report.report import Report
from tests.helpers import additivity_error, assert_no_shap_hooks, explain, rewritten
from tests.property.conditioning import condition_number, slope_overflows
from tests.property.networks import Data, Network

TOLERANCE = 1e-9
#: The property is not required of networks that magnify relative errors by more than this.
MAX_CONDITION = 1e4


class Inexact(AssertionError):
    """The property does not hold."""


def check_exact(network: Network, datasets: list[Data], variances: bool = False) -> list[str]:
    """Explain a network on several sets of data, and return the outcome for each.

    An outcome is ``"exact"``, or the reason why the property is not required: ``"ill-conditioned"``
    if the network's own output has too few digits, ``"overflow"`` if it computes NaN or infinity or
    its steepest slope overflows, ``"zero"`` if all outputs are 0 or denormal, so that no error can
    be relative to them.

    Parameters
    ----------
    network : Network
    datasets : list of Data
    variances : bool
        Whether to explain with the variance rule.

    Raises
    ------
    Inexact
        If attributions do not add up or are not finite, if the plain call has changed, or if the
        report lacks an operation that was rewritten.
    """
    model = network.build()
    explainable = fxshap.make_explainable(model, rule="variance" if variances else "rescale")
    outcomes = [check_data(model, explainable, network, data) for data in datasets]
    if "exact" in outcomes:
        check_report(explainable)
    return outcomes


def check_data(
    model: torch.nn.Module, explainable: fxshap.ExplainableModule, network: Network, data: Data
) -> str:
    """Explain on one set of data, and return the outcome."""
    samples, references = data.draw(network.inputs)
    both = [torch.cat(pair) for pair in zip(samples, references, strict=True)]
    with torch.no_grad():
        before = model(*both)
    scale = float(before.abs().max())
    if scale < torch.finfo(before.dtype).tiny:
        return "zero"
    condition, overflow = condition_number(model, samples, references)
    if overflow or slope_overflows(before, both, len(samples[0])):
        return "overflow"
    if not condition <= MAX_CONDITION:
        return "ill-conditioned"
    # SHAP's own check has an absolute bound of 0.01.
    values = explain(explainable, references, samples, check_additivity=scale < 1e6)
    if not all(np.isfinite(phi).all() for phi in values):
        raise Inexact("the attributions are not finite")
    error = additivity_error(model, references, samples, values)
    if not error <= TOLERANCE:
        raise Inexact(f"additivity error {error:.1e} at a condition number of {condition:.1e}")
    check_plain_call(model, explainable, both, before)
    return "exact"


def check_plain_call(
    model: torch.nn.Module,
    explainable: fxshap.ExplainableModule,
    inputs: list[Tensor],
    before: Tensor,
) -> None:
    """Raise unless a plain call returns the model's own output, as before the explanation."""
    assert_no_shap_hooks(explainable)
    with torch.no_grad():
        if not torch.equal(model(*inputs), before):
            raise Inexact("the model's own output has changed")
        if not torch.equal(explainable(*inputs), before):
            raise Inexact("the plain output is not the model's own")


def check_report(explainable: fxshap.ExplainableModule) -> None:
    """Raise unless the report counts every rewritten node under its own operator."""
    nodes = Counter(str(original_operator(node)) for node in rewritten(explainable))
    report: Report = explainable.report()
    named = Counter[str]()
    for entry in report.entries:
        if entry.treatment in ("closed", "generic"):
            named[entry.operation] += entry.nodes
    if named != nodes:
        raise Inexact(f"the report counts {named}, but the rewritten nodes are {nodes}")
