"""Explanations at the same time: interleaved, in threads and in processes."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import shap
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fxshap
from fxshap.errors import InputError
from tests.end_to_end.small_models import REFERENCES, SAMPLES, Model, data, values
from tests.helpers import assert_no_shap_hooks, assert_same_values


def in_threads(work: Callable[[int], Any], count: int) -> list[Any]:
    """Run in threads that start together; return what each returned, or raise what it raised."""
    found: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(k: int) -> None:
        start.wait()
        try:
            found[k] = work(k)
        except BaseException as error:
            found[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def test_two_explainers_interleaved_sample_by_sample(model):
    """Also with an explanation inside another, as in a callback."""
    explainable = fxshap.make_explainable(model)
    backgrounds = [data(6, 1), data(2, 3)]
    explainers = [shap.DeepExplainer(explainable, background) for background in backgrounds]
    expected = [values(fxshap.make_explainable(model), background) for background in backgrounds]
    for row in range(len(SAMPLES)):
        for explainer, whole in zip(explainers, expected, strict=True):
            found = explainer.shap_values(SAMPLES[row : row + 1])
            np.testing.assert_allclose(found, whole[0][row : row + 1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("captured", [False, True], ids=["before capture", "after capture"])
@pytest.mark.parametrize("shared", [True, False], ids=["one model", "two models"])
def test_threads_explain_at_once(shared, captured):
    models = [Model(0), Model(0 if shared else 1), Model(0)]
    one = fxshap.make_explainable(models[0])
    explainables = [one, one if shared else fxshap.make_explainable(models[1]), one]
    expected = [
        values(fxshap.make_explainable(model), data(6, k)) for k, model in enumerate(models)
    ]
    if captured:
        for explainable in explainables:
            values(explainable)

    def work(k: int) -> list[list[np.ndarray]]:
        # No warnings filter: it is one for all threads.
        explainer = shap.DeepExplainer(explainables[k], data(6, k))
        return [[explainer.shap_values(SAMPLES)] for _ in range(4)]

    for k, repeated in enumerate(in_threads(work, 3)):
        for found in repeated:
            assert_same_values(found, expected[k])
    for explainable in explainables:
        assert_no_shap_hooks(explainable)


def test_a_failure_in_one_thread_does_not_reach_another(model):
    """The hooks that a failed call leaves behind are its own thread's."""
    explainable = fxshap.make_explainable(model)
    expected = values(explainable)
    bad = SAMPLES.clone()
    bad[0, 0] = torch.nan

    def work(k: int) -> Any:
        explainer = shap.DeepExplainer(explainable, REFERENCES)
        if k == 0:
            return [[explainer.shap_values(SAMPLES)] for _ in range(6)]
        for _ in range(12):
            with pytest.raises(InputError):
                explainer.shap_values(bad)
        return None

    for found in in_threads(work, 2)[0]:
        assert_same_values(found, expected)


def test_a_failure_in_one_thread_leaves_the_layer_hook_of_another(model):
    """Removing the hooks of a failed call must not stop a running explanation of a layer."""
    explainable = fxshap.make_explainable(model)
    layer = explainable.get_submodule("act")
    expected = shap.DeepExplainer((explainable, layer), REFERENCES).shap_values(SAMPLES)
    bad = SAMPLES.clone()
    bad[0, 0] = torch.nan

    def work(k: int) -> Any:
        if k == 0:
            explainer = shap.DeepExplainer((explainable, layer), REFERENCES)
            return [explainer.shap_values(SAMPLES) for _ in range(6)]
        explainer = shap.DeepExplainer(explainable, REFERENCES)
        for _ in range(12):
            with pytest.raises(InputError):
                explainer.shap_values(bad)
        return None

    for values_of_layer in in_threads(work, 2)[0]:
        np.testing.assert_allclose(values_of_layer, expected, rtol=1e-5, atol=1e-6)


def test_a_split_prefix_runs_while_another_thread_explains():
    """Both put the model into evaluation mode for a while; it stays in training mode after both."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 2)).double()
    explainable = fxshap.make_explainable(net)
    prefix, _ = explainable.split_at("2")
    expected = prefix(SAMPLES)

    def work(k: int) -> Any:
        if k == 0:
            explainer = fxshap.DeepExplainer(explainable, REFERENCES)
            return [explainer(SAMPLES) for _ in range(6)] and []
        return [prefix(SAMPLES) for _ in range(100)]

    for passing in in_threads(work, 2)[1]:
        assert torch.equal(passing, expected)
    assert all(module.training for module in net.modules())


def test_a_thread_predicts_while_another_explains(model):
    explainable = fxshap.make_explainable(model)
    values(explainable)
    expected = model(SAMPLES)

    def work(k: int) -> bool:
        if k == 0:
            explainer = shap.DeepExplainer(explainable, REFERENCES)
            return all(np.isfinite(explainer.shap_values(SAMPLES)).all() for _ in range(5))
        return all(torch.equal(explainable(SAMPLES), expected) for _ in range(500))

    assert all(in_threads(work, 2))


class Slow(Model):
    """Stays long in its forward pass and tells which thread enters and leaves."""

    def __init__(self, tell: Callable[[str], Any]) -> None:
        super().__init__()
        self.inside = threading.Event()
        self.tell = tell  # export puts attributes that are lists back as they were

    def forward(self, x: Tensor) -> Tensor:
        self.tell(f"{threading.current_thread().name} in")
        self.inside.set()
        time.sleep(0.3)
        self.tell(f"{threading.current_thread().name} out")
        return super().forward(x)


def test_a_prediction_waits_while_another_thread_captures():
    """torch.export puts other tensors into the modules that it traces, for every thread."""
    log: list[str] = []
    model = Slow(log.append)
    explainable = fxshap.make_explainable(model)
    expected = model(SAMPLES)
    log.clear()
    model.inside.clear()
    capture = threading.Thread(target=explainable.capture, args=(SAMPLES,), name="capture")
    capture.start()
    assert model.inside.wait(60)
    found = explainable(SAMPLES)
    capture.join(120)
    assert torch.equal(found, expected)
    *before, entered, left = log
    assert before and all(event.startswith("capture") for event in before)
    assert [entered, left] == ["MainThread in", "MainThread out"]


def test_predictions_do_not_wait_for_one_another():
    both_in = threading.Barrier(2)
    explainable = fxshap.make_explainable(
        Slow(lambda way: way.endswith(" in") and both_in.wait(60))
    )
    expected = Model()(SAMPLES)
    for found in in_threads(lambda k: explainable(SAMPLES), 2):
        assert torch.equal(found, expected)


def explain_elsewhere(explainable: nn.Module, send: Any) -> None:
    torch.set_num_threads(1)
    send.send(values(explainable))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_explains(model, method):
    explainable = fxshap.make_explainable(model)
    expected = values(explainable)
    context = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=explain_elsewhere, args=(explainable, send))
    process.start()
    assert receive.poll(120)
    assert_same_values(receive.recv(), expected)
    process.join(60)
    assert process.exitcode == 0
    assert_same_values(values(explainable), expected)


def test_a_fork_while_another_thread_explains(model):
    """The child does not wait for a thread that it does not have."""
    from fxshap.runtime.locks import explanation_lock

    explainable = fxshap.make_explainable(model)
    expected = values(explainable)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with explanation_lock():
            inside.set()
            leave.wait(120)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=explain_elsewhere, args=(explainable, send))
    process.start()
    try:
        assert receive.poll(60)
        assert_same_values(receive.recv(), expected)
    finally:
        leave.set()
        process.kill()
        process.join()
        thread.join()


class Explained(Dataset):
    """Samples with their attributions, found by the workers."""

    def __init__(self, explainable: nn.Module) -> None:
        self.explainable = explainable

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, row: int) -> Tensor:
        explainer = shap.DeepExplainer(self.explainable, REFERENCES)
        return torch.from_numpy(explainer.shap_values(SAMPLES[row : row + 1])[0])


def test_workers_of_a_data_loader_explain(model):
    explainable = fxshap.make_explainable(model)
    (expected,) = values(explainable)
    loader = DataLoader(
        Explained(explainable), batch_size=3, num_workers=2, multiprocessing_context="fork"
    )
    (batch,) = loader
    np.testing.assert_allclose(batch.numpy(), expected, rtol=0, atol=1e-13)
