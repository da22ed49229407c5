"""What an attribution method does on one network, compared with brute force.

A method's distance is sum |phi - exact| / sum |exact| over the pairs of a sample and a reference,
the features and the outputs, in float64. It adds up if its attributions sum to the difference of
the outputs, to 1e-5 of the outputs.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxshap
from benchmarks import adapters
from benchmarks.accuracy.dasp import dasp_of_pairs
from benchmarks.adapters import join, split
from benchmarks.samplers import SAMPLERS, with_sampler
from fxshap.frontend.arguments import Call
from fxshap.verification.shapley import shapley_values
from tests.networks import Network
from tests.networks.reports import Report

ADDS_UP = 1e-5
EVALUATIONS = 500
"""Rows that SHAP's sampling explainers evaluate, the default of PermutationExplainer."""

Inputs = tuple[Tensor, ...]
Method = Callable[[nn.Module, Inputs, Inputs, int], Tensor]


@dataclass(frozen=True)
class Measurement:
    """What one method did on one network.

    Parameters
    ----------
    distance : float
        The distance to the exact Shapley values; NaN if the method gave no values.
    additivity_error : float
        The largest failure to sum to the difference of the outputs, relative to the largest
        output.
    reason : str
        Why there are no values, if there are none.
    seconds : float
        Processor seconds for one more pair and all outputs; NaN if not measured.
    """

    distance: float = math.nan
    additivity_error: float = math.nan
    reason: str = ""
    seconds: float = math.nan

    @property
    def adds_up(self) -> bool:
        """Whether the attributions sum to the difference of the outputs."""
        return self.additivity_error < ADDS_UP


Results = dict[str, dict[str, Measurement]]


def pairs(samples: Inputs, references: Inputs) -> list[tuple[Inputs, Inputs]]:
    """List the pairs of a sample and a reference, each a batch of one."""
    count = samples[0].shape[0]
    return [
        (tuple(x[i : i + 1] for x in samples), tuple(r[i : i + 1] for r in references))
        for i in range(count)
    ]


def one_by_one(method: adapters.Method) -> Method:
    """Return a method that explains every pair of a sample and a reference by itself."""

    def explain(model: nn.Module, samples: Inputs, references: Inputs, outputs: int) -> Tensor:
        each = pairs(samples, references)
        return torch.cat([method(model, r, outputs)(x) for x, r in each])

    return explain


def with_fxshap(
    model: nn.Module, samples: Inputs, references: Inputs, outputs: int, **options: Any
) -> Tensor:
    """Explain every pair with SHAP on one explainable model, and have SHAP check the sums."""
    explainable = fxshap.make_explainable(model, **options)
    checked = one_by_one(partial(adapters.with_shap, check_additivity=True))
    return checked(explainable, samples, references, outputs)


FXSHAP, VARIANCES, GRADIENTS = "fxshap", "fxshap, variances", "integrated gradients"
METHODS: dict[str, Method] = {
    "SHAP": one_by_one(adapters.with_shap),
    "Captum": one_by_one(adapters.with_captum),
    "tangermeme": one_by_one(adapters.with_tangermeme),
    GRADIENTS: one_by_one(adapters.with_integrated_gradients),
    "expected gradients": one_by_one(adapters.with_expected_gradients),
    "DASP": dasp_of_pairs,
    **{
        name: one_by_one(partial(with_sampler, sampler=sampler, evaluations=EVALUATIONS))
        for name, sampler in SAMPLERS.items()
    },
    FXSHAP: with_fxshap,
    VARIANCES: partial(with_fxshap, rule="variance"),
    "fxshap, refine=4": partial(with_fxshap, refine=4),
    "fxshap, exact": partial(with_fxshap, refine="exact"),
}


class CalledAs(nn.Module):
    """The model of a report behind its inputs, with its options and bound arguments."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.model = report.build().double()
        bound = pytree.tree_map(as_double, report.bound)
        self.calls = fxshap.make_explainable(self.model, **report.options).bind(**bound)._calls
        self(*report.inputs(2, dtype=torch.float64))  # which bound tensors have rows

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output that is explained, one column for each."""
        output: Tensor = self.calls.output(Call.of(inputs, {}))
        return output.reshape(len(inputs[0]), -1)


def as_double(value: Any) -> Any:
    """Return a floating-point tensor as float64."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def build(network: Network) -> nn.Module:
    """Build a network in float64; the model of a report as its users call it."""
    if isinstance(network, Report):
        return CalledAs(network)
    return network.build().double()


def exact_values(network: Network, samples: Inputs, references: Inputs) -> Tensor:
    """Compute the exact Shapley values, of shape (pairs, features, outputs)."""
    model = build(network)

    def function(flat: Tensor) -> Tensor:
        return model(*split(flat, network.shapes))

    points = zip(join(samples), join(references), strict=True)
    return torch.stack([shapley_values(function, x, r) for x, r in points])


def explain(method: Method, network: Network, samples: Inputs, references: Inputs) -> Tensor:
    """Attribute a new build of the network, without the method's warnings."""
    model = build(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = method(
            model,
            tuple(x.clone() for x in samples),
            tuple(r.clone() for r in references),
            network.outputs,
        )
    if not values.isfinite().all():
        raise ArithmeticError("the attributions are not finite")
    return values


def seconds_of_one_more(
    method: Method, network: Network, samples: Inputs, references: Inputs
) -> float:
    """Return how much longer all pairs take than the first, divided by their number."""
    seconds = []
    for count in (1, len(samples[0])):
        start = time.process_time()
        explain(
            method, network, *(tuple(t[:count] for t in points) for points in (samples, references))
        )
        seconds.append(time.process_time() - start)
    return max(seconds[1] - seconds[0], 0.0) / max(len(samples[0]) - 1, 1)


def measure(
    network: Network, methods: list[str], count: int, timed: bool = False
) -> dict[str, Measurement]:
    """Measure every method on one network.

    Parameters
    ----------
    network : Network
        The network to explain.
    methods : list of str
        Names of `METHODS`.
    count : int
        The number of pairs of a sample and a reference.
    timed : bool
        Whether to measure times. Each method then runs once more.

    Returns
    -------
    dict
        A measurement for each method.
    """
    samples = network.inputs(count, seed=1, dtype=torch.float64)
    references = network.inputs(count, seed=2, dtype=torch.float64)
    try:
        model = build(network)
        with torch.no_grad():
            y, y_reference = model(*samples), model(*references)
    except RuntimeError as error:  # its constants are in float32
        reason = f"the network does not take float64: {error}"
        return {name: Measurement(reason=reason) for name in methods}
    exact = exact_values(network, samples, references)
    largest = torch.maximum(y.abs().max(), y_reference.abs().max())
    measurements = {}
    for name in methods:
        try:
            values = explain(METHODS[name], network, samples, references)
            if values.shape != exact.shape:
                raise ValueError(f"attributions of {values.shape[-1]} of {exact.shape[-1]} outputs")
            seconds = (
                seconds_of_one_more(METHODS[name], network, samples, references)
                if timed
                else math.nan
            )
        except Exception as error:  # any failure of a method is a result
            first_line = (str(error).strip() or "no message").splitlines()[0]
            reason = f"{type(error).__name__}: {first_line[:200]}"
            measurements[name] = Measurement(reason=reason)
            continue
        additivity_error = (values.sum(dim=1) - (y - y_reference)).abs().max() / largest
        distance = (values - exact).abs().sum() / exact.abs().sum()
        measurements[name] = Measurement(distance.item(), additivity_error.item(), seconds=seconds)
    return measurements
