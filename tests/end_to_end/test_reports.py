"""SHAP, Captum and tangermeme on the models that people reported, and on habits that many share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import DeepLiftShap
from tangermeme.deep_lift_shap import deep_lift_shap
from torch import Tensor

import fxshap
from fxshap.verification.metrics import MAX_FEATURES
from tests.helpers import assert_exact
from tests.networks.reports import REPORTS, Report

LIMIT = 1e-5  # of the largest output, float32


def of(tool: str) -> pytest.MarkDecorator:
    """Every model that a tool can explain."""
    names = [name for name, report in REPORTS.items() if tool in report.tools]
    return pytest.mark.parametrize("report", [REPORTS[name] for name in names], ids=names)


#: Every third model with few features. ``make fidelity`` computes the exact values of all of them.
SMALL = [
    report
    for report in REPORTS.values()
    if "shap" in report.tools and report.features <= MAX_FEATURES
][::3]


def explainable(report: Report, **options: Any) -> fxshap.ExplainableModule:
    made = fxshap.make_explainable(report.build(), **{**report.options, **options})
    return made.bind(**report.bound) if report.bound else made


def plain(report: Report, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output that is explained, one column an output."""
    with torch.no_grad():
        return explainable(report)(*inputs).reshape(len(inputs[0]), -1)


def assert_sums(report: Report, values: list[Tensor], column: int) -> None:
    """Check that attributions, averaged over the references, sum to the change of an output."""
    samples, references = report.inputs(2, seed=2), report.inputs(5, seed=1)
    outputs, expected = plain(report, samples), plain(report, references)
    total = sum(phi.detach().flatten(1).sum(1) for phi in values)
    change = outputs[:, column] - expected[:, column].mean()
    limit = LIMIT * max(outputs.abs().max().item(), expected.abs().max().item())
    assert (total - change).abs().max() <= limit


@of("shap")
def test_shap_adds_up(report):
    references, samples = report.inputs(5, seed=1), report.inputs(2, seed=2)
    model = explainable(report)
    assert_exact(model, model, references, samples, LIMIT)


@pytest.mark.parametrize("report", SMALL, ids=lambda report: report.name)
def test_exact_values_are_exact(report):
    references, samples = report.inputs(3, seed=1), report.inputs(1, seed=2)
    exact = fxshap.verify(explainable(report, refine="exact"), references, samples)
    assert exact.additive and exact.shapley_distance < 1e-3


@of("captum")
def test_captum_adds_up(report):
    references, samples = report.inputs(5, seed=1), report.inputs(2, seed=2)
    columns = plain(report, samples).shape[1]
    target = columns - 1 if columns > 1 else None
    values = DeepLiftShap(explainable(report)).attribute(samples, references, target=target)
    assert_sums(report, list(values), columns - 1)


@of("tangermeme")
def test_tangermeme_adds_up(report):
    (references,), (samples,) = report.inputs(5, seed=1), report.inputs(2, seed=2)
    columns = plain(report, (samples,)).shape[1]
    values = deep_lift_shap(
        explainable(report),
        samples,
        references=references.expand(len(samples), *references.shape),
        target=columns - 1,
        device="cpu",
    )
    assert_sums(report, [values], columns - 1)
