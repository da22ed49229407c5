"""The zoo benchmark: what it measures of a network, and when it reports that something is worse."""

import dataclasses
import datetime
import json
import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.coverage import __main__ as zoo
from benchmarks.coverage import report
from benchmarks.coverage.entry import Entry, only_tensor
from benchmarks.coverage.measure import (
    Head,
    Measurement,
    calibrate,
    draw,
    measure,
)
from tests.tools.sources import digest_of

DTYPES = (torch.float32, torch.float64)


class Tiny(nn.Module):
    """Two inputs, a batch norm and a head that begins as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, str]:
        return self.head(torch.relu(self.norm(self.body(x))) * y), "more"


class Narrow(nn.Module):
    """Computes in float32 whatever its input is."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().tanh().to(x.dtype)


class Branching(nn.Module):
    """Cannot be captured."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def entry(build, shapes=((4,),), name="tiny") -> Entry:
    return Entry("here", "small", name, build, shapes, only_tensor)


TINY = entry(Tiny, ((4,), (6,)))


@pytest.fixture(scope="module")
def measured() -> list[Measurement]:
    """The tiny network, measured once for all tests."""
    return measure(TINY, DTYPES)


def test_a_network_is_measured_in_both_types(measured):
    single, double = measured
    assert (single.dtype, double.dtype) == ("float32", "float64")
    assert not single.failure and not double.failure
    assert report.explained(single) and report.explained(double)
    assert single.additivity_error < 1e-5 and double.additivity_error < 1e-13
    assert single.output_difference < 1e-6 and double.output_difference < 1e-14
    assert 0 < single.rounding < 1e-5 and double.rounding == 0
    assert single.signal == pytest.approx(double.signal, rel=1e-3) and single.signal > 0.01
    assert single.capture_seconds > 0 and not single.generic and not single.narrow
    assert "torch" in single.software and single.sources == double.sources


def test_batch_norms_get_parameters_and_statistics_and_zero_matrices_noise():
    torch.manual_seed(0)
    model = Head(TINY)
    batches = [draw(8, TINY) for _ in range(2)]
    calibrate(model, batches, drawn=True)
    norm, head = model.network.norm, model.network.head
    hidden = torch.stack([model.network.body(x) for x, _ in batches])
    assert torch.allclose(norm.running_mean, hidden.mean((0, 1)), atol=1e-6)
    assert torch.allclose(norm.running_var, hidden.var(1).mean(0), atol=1e-6)
    assert ((0 < norm.weight) & (norm.weight < 1) & (0 < norm.bias) & (norm.bias < 1)).all()
    assert head.weight.any() and not model.training and not norm.training
    calibrate(model, batches, drawn=False)
    assert torch.allclose(norm.running_mean, hidden.mean((0, 1)), atol=1e-6)


def test_gains_of_other_norms_are_drawn_and_other_vectors_are_not():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.PReLU(8))
    bias, slope = model[1].bias.clone(), model[2].weight.clone()
    calibrate(model, [], drawn=False)
    assert (model[0].weight == 1).all()
    calibrate(model, [], drawn=True)
    assert ((0 < model[0].weight) & (model[0].weight < 1)).all() and (model[0].bias == 0).all()
    assert torch.equal(model[1].bias, bias) and torch.equal(model[2].weight, slope)


def test_a_network_that_computes_in_float32_inside_is_told_apart():
    single, double = measure(entry(Narrow), DTYPES)
    assert (single.narrow, double.narrow) == (False, True)
    assert report.limit(double) == report.NARROW_LIMIT
    assert report.explained(double) and double.additivity_error > 1e-12


def test_what_cannot_be_explained_is_recorded_with_the_reason():
    for found in measure(entry(Branching), DTYPES):
        assert found.failure.startswith("CaptureError") and "torch.where" in found.failure
        assert not report.explained(found) and math.isnan(found.additivity_error)
    for found in measure(entry(lambda: nn.Linear(3, 2)), DTYPES):  # the input has 4 features
        assert found.failure.startswith("RuntimeError")


GOOD = Measurement(
    "here", "small", "tiny", "float32", 1e-6, 1e-7, 1e-7, 0.5, sources="a", date="2020-01-02"
)
FAILED = dataclasses.replace(GOOD, additivity_error=math.nan, failure="CaptureError: no")


@pytest.mark.parametrize(
    "found, before, worse",
    [
        (GOOD, GOOD, False),
        (GOOD, None, False),
        (GOOD, FAILED, False),
        (FAILED, FAILED, False),
        (FAILED, GOOD, True),
        (FAILED, None, True),
        (dataclasses.replace(GOOD, additivity_error=2e-4), GOOD, True),
        (dataclasses.replace(GOOD, additivity_error=math.nan), GOOD, True),
        (dataclasses.replace(GOOD, output_difference=2e-5), GOOD, True),
        # within the limit, and ten times the published error
        (dataclasses.replace(GOOD, additivity_error=9e-6), GOOD, False),
        (dataclasses.replace(GOOD, additivity_error=2e-5), GOOD, True),
        # an error of nothing is luck
        (GOOD, dataclasses.replace(GOOD, additivity_error=0.0), False),
        (dataclasses.replace(GOOD, dtype="float64", additivity_error=1e-12), GOOD, False),
        # outside the limit before and now: no worse unless it has grown
        (
            dataclasses.replace(GOOD, additivity_error=3e-4),
            dataclasses.replace(GOOD, additivity_error=2e-4),
            False,
        ),
        (
            dataclasses.replace(GOOD, additivity_error=3e-3),
            dataclasses.replace(GOOD, additivity_error=2e-4),
            True,
        ),
    ],
)
def test_worse_than_published(found, before, worse):
    published = [] if before is None else [before]
    assert bool(report.regressions([found], published)) is worse


def test_the_data_are_read_back(tmp_path):
    other = dataclasses.replace(
        FAILED, dtype="float64", narrow=True, generic=["aten.topk.default", "aten.index.Tensor"]
    )
    report.write_data(tmp_path / "data.csv", [GOOD, other])
    one, two = report.read_data(tmp_path / "data.csv")
    assert repr([one, two]) == repr([GOOD, other])  # nan does not equal itself
    assert report.read_data(tmp_path / "nowhere.csv") == []


@pytest.fixture
def run(measured, tmp_path, monkeypatch):
    """Run the command on one network; return its status and how many networks it measured."""
    calls = []

    def measure_again(network, dtypes, *, drawn):
        calls.append(network.name)
        return [m for m, dtype in zip(measured, DTYPES, strict=True) if dtype in dtypes]

    monkeypatch.setattr(zoo, "ZOOS", {"here": lambda: iter([TINY])})
    monkeypatch.setattr(zoo, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(zoo, "measure", measure_again)

    def go(*arguments: str) -> tuple[int, int]:
        calls.clear()
        status = zoo.main(["--results", str(tmp_path / "results.jsonl"), *arguments])
        return status, len(calls)

    return go


def test_a_run_goes_on_where_it_was_and_publishes(run, tmp_path, capsys):
    assert run("--dtypes", "float32") == (0, 1)
    assert not (tmp_path / "docs").exists()  # not all was measured
    assert run() == (0, 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "tiny" in line]
    assert [line.split()[2] for line in lines] == ["float32", "float64"]
    page = (tmp_path / "docs" / "coverage.md").read_text()
    assert "1 of 1 networks" in page and "| small    | tiny       | yes " in page
    assert (tmp_path / "docs" / "figures" / "coverage.png").stat().st_size > 1000
    assert run() == (0, 0)
    assert run("--fresh") == (0, 1)


CODE = "import math\n\ndef area(r):\n    return math.pi * r**2\n\ndef twice(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    "texts",
    [
        ['"""A module."""\n' + CODE],
        [CODE.replace("    return 2", '    """Double it."""\n    return 2') + "# a comment"],
        reversed(CODE.split("\n\n")),
        ["from math import *\n" + CODE],
    ],
    ids=["module docstring", "docstring", "moved", "import"],
)
def test_the_digest_stays_when_no_statement_changes(texts):
    assert digest_of(texts) == digest_of([CODE])


def test_the_digest_changes_with_a_statement():
    assert digest_of([CODE.replace("**2", "**3")]) != digest_of([CODE])


def test_other_sources_are_measured_again(run, tmp_path):
    run()
    results = tmp_path / "results.jsonl"
    old = [{**json.loads(text), "sources": "other"} for text in results.read_text().splitlines()]
    results.write_text("".join(json.dumps(record) + "\n" for record in old))
    assert run() == (0, 1)


def test_an_update_keeps_published_results_with_their_dates(run, tmp_path):
    data, page = tmp_path / "docs" / "coverage.csv", tmp_path / "docs" / "coverage.md"
    run()
    assert "stand" not in page.read_text()
    single, double = report.read_data(data)
    old = dataclasses.replace(double, date="2020-01-02", additivity_error=3e-16)
    report.write_data(data, [single, old])
    assert run("--fresh", "--dtypes", "float32", "--update") == (0, 1)
    single, double = report.read_data(data)
    assert (single.date, double.date) == (datetime.date.today().isoformat(), "2020-01-02")
    assert double.additivity_error == 3e-16
    assert "The results of 1 networks from 2020-01-02 stand" in page.read_text()


def test_a_worse_network_is_said_and_not_published(run, tmp_path, capsys):
    run()
    data = tmp_path / "docs" / "coverage.csv"
    better = [
        dataclasses.replace(m, additivity_error=m.additivity_error / 1e6)
        for m in report.read_data(data)
    ]
    report.write_data(data, better)
    published = data.read_text()
    results = tmp_path / "results.jsonl"
    worse = [
        {**json.loads(text), "additivity_error": 5e-5} for text in results.read_text().splitlines()
    ]
    results.write_text("".join(json.dumps(record) + "\n" for record in worse))
    capsys.readouterr()
    assert run() == (1, 0)
    assert capsys.readouterr().out.count("worse than published: here tiny") == 2
    assert data.read_text() == published
    assert run("--publish") == (1, 0)
    assert data.read_text() != published
    assert run() == (0, 0)
