"""Pairs in a graph for a fixed number of rows, where no dimension tells which row is whose."""

import pytest
import torch
from captum.attr import DeepLift

import fxshap
from tests.networks.reports import REPORTS

FIXED = ["rows_folded", "rows_second", "rows_last", "rows_sorted"]


def change(model, samples, references):
    """The change of the last output of each pair, as attributions must add up to it."""
    with torch.no_grad():
        return (model(samples) - model(references))[:, -1]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("repeated", [False, True], ids=["samples", "one_sample"])
def test_every_pair_adds_up(name, repeated):
    report = REPORTS[name]
    model = fxshap.make_explainable(report.build().double(), progress=False)
    (references,), (samples,) = (report.inputs(4, seed=s, dtype=torch.float64) for s in (1, 2))
    samples = samples[:1].repeat(4, 1, 1) if repeated else samples
    values = DeepLift(model).attribute(samples, references, target=2).detach()
    required = change(model, samples, references)
    assert (values.flatten(1).sum(1) - required).abs().max() <= 1e-12 * max(required.abs().max(), 1)


def test_rows_that_are_not_explained_get_nothing():
    report = REPORTS["rows_folded"]
    model = fxshap.make_explainable(report.build().double(), progress=False)
    (references,), (samples,) = (report.inputs(4, seed=s, dtype=torch.float64) for s in (1, 2))
    samples[1:] = references[1:]
    rows = torch.cat([samples, references]).requires_grad_()
    with fxshap.multiplier_mode():
        output = model(rows)
    (multipliers,) = torch.autograd.grad(output[0, 2], rows)
    assert multipliers[[0, 4]].abs().max() > 0 and multipliers[1:4].abs().max() == 0
