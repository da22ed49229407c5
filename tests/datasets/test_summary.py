"""Summaries are the same however the rows are divided, and SHAP's plots take them."""

import numpy as np
import pytest
import shap

from fxshap.datasets.batch import ExplainedBatch
from fxshap.datasets.summary import Summary, random_numbers

RNG = np.random.default_rng(0)
VALUES, INPUTS = RNG.normal(size=(500, 4, 2)), RNG.normal(size=(500, 4))
ERRORS, BASE = RNG.random(500) * 1e-6, np.ones((500, 2))
REFUSED = {17: "x contains NaN", 400: "x is missing"}


def batch(start: int, stop: int) -> ExplainedBatch:
    rows = slice(start, stop)
    reasons = {row - start: text for row, text in REFUSED.items() if start <= row < stop}
    values, errors = VALUES[rows].copy(), ERRORS[rows].copy()
    values[list(reasons)] = errors[list(reasons)] = np.nan
    return ExplainedBatch(
        ["shap_values"], [values], [INPUTS[rows]], {}, errors, reasons, BASE[rows]
    )


def summarize(cuts: list[int], **options) -> Summary:
    total = Summary(**options)
    for start, stop in zip([0, *cuts], [*cuts, 500], strict=True):
        part = Summary(**options)
        part.add(batch(start, stop), start)
        total.merge(part)
    return total


@pytest.mark.parametrize("cuts", [[], [17], [18, 19, 250], list(range(50, 500, 50))])
def test_merged_summaries_are_those_of_all_rows(cuts):
    summary = summarize(cuts, sample_rows=60)
    good = np.setdiff1d(np.arange(500), list(REFUSED))
    assert (summary.rows, summary.refused, summary.explained) == (500, 2, 498)
    assert [(r.row, r.reason) for r in summary.refused_rows] == list(REFUSED.items())
    np.testing.assert_allclose(summary.mean_abs[0], np.abs(VALUES[good]).mean(0), rtol=1e-12)
    assert summary.largest_error_row == good[ERRORS[good].argmax()]
    assert summary.largest_error == ERRORS[summary.largest_error_row]
    drawn = good[np.argsort(random_numbers(good))[:60]]
    np.testing.assert_array_equal(summary.sample.rows, drawn)
    np.testing.assert_array_equal(summary.sample.values[0], VALUES[drawn])


def test_a_limit_of_the_random_numbers_draws_the_same_rows():
    bounded = summarize([100, 300], sample_rows=60, below=2 * 60 / 500)
    np.testing.assert_array_equal(bounded.sample.rows, summarize([], sample_rows=60).sample.rows)


def test_random_numbers_are_uniform():
    numbers = random_numbers(np.arange(100_000))
    counts = np.histogram(numbers, 20, (0, 1))[0]
    assert counts.sum() == 100_000 and np.abs(counts - 5000).max() < 350  # five deviations
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02


def test_summaries_are_written_and_read(tmp_path):
    summary = summarize([100])
    summary.save(tmp_path / "summary.npz")
    loaded = Summary.load(tmp_path / "summary.npz")
    assert loaded.refused_rows == summary.refused_rows
    assert (loaded.rows, loaded.largest_error) == (summary.rows, summary.largest_error)
    np.testing.assert_array_equal(loaded.mean_abs[0], summary.mean_abs[0])
    np.testing.assert_array_equal(loaded.sample.inputs[0], summary.sample.inputs[0])
    assert [path.name for path in tmp_path.iterdir()] == ["summary.npz"]


def test_the_sample_is_an_explanation_for_plots():
    summary = summarize([200], sample_rows=50)
    explanation = summary.explanation(feature_names=list("abcd"))
    assert isinstance(explanation, shap.Explanation)
    assert explanation.values.shape == (50, 4, 2) and explanation.data.shape == (50, 4)
    import matplotlib

    matplotlib.use("Agg")
    shap.plots.beeswarm(explanation[..., 0], show=False)
    with pytest.raises(ValueError, match="no row is explained"):
        Summary().explanation()
