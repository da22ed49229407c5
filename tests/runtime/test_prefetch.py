"""All outputs of a sample at once: the same values, found sooner, within bounds of memory."""

import gc
import math
import weakref

import numpy as np
import pytest
import shap
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
import fxshap.runtime.prefetch
import fxshap.runtime.program
import fxshap.runtime.references
from fxshap.autograd.tape import Tape
from fxshap.errors import OptionError
from fxshap.runtime.references import container_memory
from fxshap.runtime.transfers import read_cotangent
from tests.helpers import assert_exact, assert_same_values, explain


class Classifier(nn.Module):
    """Slopes of every kind that is cached: gates, products, maxima, norms, softmax."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv1d(2, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.recur = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.gelu(self.embed(x)), 3, 2).mT
        x = self.norm(x) * torch.softmax(x, -1)
        return self.head(self.recur(x)[0].relu().amax(1))


def data(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 2, 9, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """How many cotangents each backward pass took."""
    counts: list[int] = []
    backward_many = Tape.backward_many

    def counted(self, reference, sample, grads):
        counts.append(len(grads))
        return backward_many(self, reference, sample, grads)

    monkeypatch.setattr(Tape, "backward_many", counted)
    return counts


@pytest.mark.parametrize(
    ("outputs", "expected"), [(1, [1, 1]), (3, [3, 3]), (6, [1, 1, 5, 5])], ids=str
)
def test_every_output_has_one_backward_pass_and_most_are_batched(outputs, expected, batches):
    model = Classifier(outputs)
    explainable = fxshap.make_explainable(model)
    assert_exact(model, explainable, [data(4, 1)], [data(2, 2)], 1e-5)
    assert batches == expected


@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize("outputs", [3, 6])
def test_prefetched_multipliers_equal_requested_ones(refine, outputs, monkeypatch):
    explainable = fxshap.make_explainable(Classifier(outputs), refine=refine)
    ahead = explain(explainable, [data(4, 1)], [data(3, 2)])
    monkeypatch.setattr(fxshap.runtime.prefetch, "MAX_BYTES", 0)
    assert_same_values(explain(explainable, [data(4, 1)], [data(3, 2)]), ahead)


def test_samples_that_occur_twice_and_ranked_outputs():
    explainable = fxshap.make_explainable(Classifier(6))
    samples = data(3, 2)[[0, 1, 0, 2, 0]]
    explainer = shap.DeepExplainer(explainable, data(4, 1))
    values = explainer.shap_values(samples)
    np.testing.assert_array_equal(values[0], values[2])
    np.testing.assert_array_equal(values[0], values[4])
    # SHAP's own check compares the ranked outputs with the first ones.
    ranked, ranks = explainer.shap_values(samples, ranked_outputs=2, check_additivity=False)
    for row, columns in enumerate(ranks):
        np.testing.assert_allclose(ranked[row], values[row][..., columns], rtol=1e-5, atol=1e-6)


def test_the_cache_stays_within_its_bound(monkeypatch, batches):
    """Room for two outputs of one sample: two samples find one more output each time."""
    monkeypatch.setattr(fxshap.runtime.prefetch, "MAX_BYTES", 2 * data(4, 1).nbytes)
    model = Classifier(6)
    assert_exact(model, fxshap.make_explainable(model), [data(4, 1)], [data(2, 2)], 1e-5)
    assert batches == [1, 1] + [2] * 4 + [1] * 2


def test_nothing_is_cached_after_the_last_output():
    explainable = fxshap.make_explainable(Classifier(6))
    explain(explainable, [data(4, 1)], [data(2, 2)])
    cache = explainable._calls.captures.latest.cache
    assert len(cache.samples) == 2
    assert not any(cached.by_output for cached in cache.samples.values())


def test_a_new_explanation_starts_without_answers():
    model = Classifier(6)
    explainable = fxshap.make_explainable(model)
    explainer = shap.DeepExplainer(explainable, data(4, 1))
    explainer.shap_values(data(2, 2), ranked_outputs=1, check_additivity=False)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert_exact(model, explainable, [data(4, 1)], [data(2, 2)], 1e-5)


@pytest.mark.parametrize(
    ("grad", "column"),
    [([[0.0, 1.0]] * 2, 1), ([[1.0, 1.0]] * 2, None), ([[0.0, 2.0]] * 2, None),
     ([[0.0, 1.0], [1.0, 0.0]], None), ([[0.0, 0.0]] * 2, None)],
    ids=str,
)  # fmt: skip
def test_only_a_single_requested_output_is_recognised(grad, column):
    halves = torch.tensor([*grad, *grad])
    assert read_cotangent(halves, torch.zeros_like(halves)).column == column


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_chunks_of_references_change_nothing_but_the_rounding(chunk, refine):
    model = Classifier(3).double()
    background, samples = [data(5, 1).double()], [data(2, 2).double()]
    whole = fxshap.make_explainable(model, refine=refine)
    chunked = fxshap.make_explainable(model, refine=refine, reference_batch_size=chunk)
    found = assert_exact(model, chunked, background, samples, 1e-12)
    expected = explain(whole, background, samples)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-13)


def test_one_chunk_is_in_memory_at_a_time(monkeypatch):
    alive = weakref.WeakSet()
    most = []

    class Watched(Tape):
        def __init__(self, graph, references, *options):
            super().__init__(graph, references, *options)
            alive.add(self)
            most.append((len(alive), len(references[0])))

    monkeypatch.setattr(fxshap.runtime.program, "Tape", Watched)
    explainable = fxshap.make_explainable(Classifier(3), reference_batch_size=2)
    explain(explainable, [data(5, 1)], [data(2, 2)])
    assert set(most) == {(1, 2), (1, 1)}


@pytest.mark.parametrize(("free", "rows"), [(0, {1}), (10**9, {5}), (None, {5})])
def test_by_default_the_tape_fits_into_free_memory(free, rows, monkeypatch):
    monkeypatch.setattr(fxshap.runtime.references, "free_memory", lambda device: free)
    model = Classifier(3)
    explainable = fxshap.make_explainable(model)
    assert_exact(model, explainable, [data(5, 1)], [data(2, 2)], 1e-5)
    assert {explainable._calls.captures.latest.references.rows} == rows


@pytest.mark.parametrize(("memory", "rows"), [(1, 1), (10**9, 5)])
def test_max_memory_limits_the_tape(memory, rows):
    model = Classifier(3)
    explainable = fxshap.make_explainable(model, max_memory=memory)
    assert_exact(model, explainable, [data(5, 1)], [data(2, 2)], 1e-5)
    assert explainable._calls.captures.latest.references.rows == rows


@pytest.mark.parametrize("memory", [0, -1, 1.5, "1 GiB"])
def test_max_memory_is_a_number_of_bytes(memory):
    with pytest.raises(OptionError, match="max_memory is a number of bytes or None, not"):
        fxshap.make_explainable(Classifier(3), max_memory=memory)


def test_free_memory_is_that_of_the_container(tmp_path):
    assert container_memory(tmp_path) == math.inf
    for name, text in (("memory.max", "max\n"), ("memory.current", "1000\n")):
        (tmp_path / name).write_text(text)
    assert container_memory(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("5000\n")
    assert container_memory(tmp_path) == 4000


def tape_parts(explainable: fxshap.ExplainableModule) -> list[weakref.ref]:
    """The tape of an explainable model, and the storage of a value on it."""
    tape = explainable._calls.captures.latest.references.cached_tape
    return [weakref.ref(tape), weakref.ref(next(iter(tape.references.values())))]


def test_release_frees_the_tape():
    model = Classifier(3)
    explainable = fxshap.make_explainable(model)
    before = explain(explainable, [data(5, 1)], [data(2, 2)])
    parts = tape_parts(explainable)
    assert all(part() is not None for part in parts)
    explainable.clear_cache()
    assert all(part() is None for part in parts)  # at once, no cycle holds them
    assert_same_values(explain(explainable, [data(5, 1)], [data(2, 2)]), before)


def test_the_tape_goes_with_the_explainable_model():
    explainable = fxshap.make_explainable(Classifier(3))
    explain(explainable, [data(5, 1)], [data(2, 2)])
    parts = tape_parts(explainable)
    del explainable
    gc.collect()
    assert all(part() is None for part in parts)


@pytest.mark.parametrize("chunk", [0, -1, 2.5, "all", None])
def test_a_chunk_is_a_number_of_rows(chunk):
    with pytest.raises(ValueError, match="reference_batch_size"):
        fxshap.make_explainable(nn.ReLU(), reference_batch_size=chunk)
