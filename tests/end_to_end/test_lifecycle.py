"""Faults and changes in the life of an explainable model: afterwards it is as good as new."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import shap
import torch
import torch.nn.functional as F
from shap.explainers._deep import deep_pytorch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader, Dataset

import fxshap
from fxshap.errors import InputError, OutputError, RuleError, WeightError
from fxshap.rules.core.registry import RULES, Rule
from tests.helpers import (
    assert_exact,
    assert_no_shap_hooks,
    assert_same_state,
    assert_same_values,
    explain,
    hooks,
    state_of,
)


class Model(nn.Module):
    """Every kind of part that can be edited: norm, dropout, an activation with a constant."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.hidden = nn.Linear(4, 8)
            self.norm = nn.BatchNorm1d(8)
            self.act: nn.Module = nn.LeakyReLU(0.1)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(8, 3)
        self.trouble: BaseException | None = None
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.trouble is not None:
            raise self.trouble
        h = self.drop(self.act(self.norm(self.hidden(x))))
        return self.head(torch.tanh(h))


def data(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator, dtype=torch.float64)


REFERENCES, SAMPLES = data(6, 1), data(3, 2)


@pytest.fixture
def model() -> Model:
    model = Model()
    F.cross_entropy(model(SAMPLES), torch.tensor([0, 1, 2])).backward()  # gradients to keep
    return model


def values(explainable: nn.Module, references: Tensor = REFERENCES) -> list[np.ndarray]:
    return explain(explainable, [references], [SAMPLES])


def assert_as_new(explainable: Any) -> None:
    """Check that it gives what a fresh one of the same model gives, and is clean afterwards."""
    fresh = fxshap.make_explainable(copy.deepcopy(explainable.model))
    assert_same_values(values(explainable), values(fresh))
    assert_exact(explainable.model, explainable, [REFERENCES], [SAMPLES], 1e-13)
    assert_no_shap_hooks(explainable)
    assert not hooks(explainable.probe)


# --- what goes wrong in the middle ----------------------------------------------------------------

TROUBLES = [ValueError("the model's own"), KeyboardInterrupt(), torch.OutOfMemoryError("memory")]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("captured", [False, True], ids=["before capture", "after capture"])
def test_an_exception_in_the_users_model(model, captured, trouble):
    explainable = fxshap.make_explainable(model)
    if captured:
        values(explainable)
    before = state_of(model)
    explainer = shap.DeepExplainer(explainable, REFERENCES)
    model.trouble = trouble
    with pytest.raises(type(trouble)):  # the check of additivity calls it, if no capture does
        explainer.shap_values(SAMPLES)
    with pytest.raises(type(trouble)):
        shap.DeepExplainer(explainable, REFERENCES)
    model.trouble = None
    assert_same_state(model, before)
    assert_as_new(explainable)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("call", [1, 4])
def test_an_exception_in_a_rule(model, monkeypatch, call, error):
    explainable = fxshap.make_explainable(model)
    before = state_of(model)
    rule, calls = RULES[torch.ops.aten.tanh], []

    def fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return rule.multiply(*args)

    monkeypatch.setitem(RULES, torch.ops.aten.tanh, Rule("fails", fails))
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RuleError):
        values(explainable)
    assert_same_state(model, before)
    monkeypatch.undo()
    assert_as_new(explainable)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_an_exception_between_samples(model, monkeypatch, calls, error):
    explainable = fxshap.make_explainable(model)
    before = state_of(model)
    gradient, done = deep_pytorch.PyTorchDeep.gradient, []

    def broken_off(self: Any, *args: Any) -> Any:
        if len(done) == calls:
            raise error
        done.append(1)
        return gradient(self, *args)

    explainer = shap.DeepExplainer(explainable, REFERENCES)
    monkeypatch.setattr(deep_pytorch.PyTorchDeep, "gradient", broken_off)
    with pytest.raises(error):
        explainer.shap_values(SAMPLES)
    monkeypatch.undo()
    assert_same_state(model, before)
    assert torch.equal(explainable(SAMPLES), model(SAMPLES))
    assert_same_values([explainer.shap_values(SAMPLES)], values(fxshap.make_explainable(model)))
    assert_as_new(explainable)


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


# --- threads --------------------------------------------------------------------------------------


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
    capture = threading.Thread(target=explainable.prepare, args=(SAMPLES,), name="capture")
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


# --- copies and processes -------------------------------------------------------------------------


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("captured", [False, True], ids=["before capture", "after capture"])
def test_a_copy_gives_the_same_bits(model, captured, name):
    explainable = fxshap.make_explainable(model, output=0, refine=1)
    expected = values(explainable) if captured else None
    duplicate = COPIES[name](explainable)
    found = values(duplicate)
    assert_same_values(found, expected or values(explainable))
    assert_same_values(values(explainable), found)
    assert_no_shap_hooks(duplicate)


@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
def test_a_copy_made_in_the_middle_of_an_explanation(model, name):
    explainable = fxshap.make_explainable(model)
    duplicates: list[Any] = []

    def duplicate(*_: Any) -> None:
        if explainable.mode == "shap" and not duplicates:
            handle.remove()
            duplicates.append(COPIES[name](explainable))

    handle = explainable.register_forward_hook(duplicate)
    expected = values(explainable)
    assert duplicates[0].mode == "plain"
    assert_same_values(values(duplicates[0]), expected)


def test_weights_alone_go_from_one_to_another_and_load_safely(model):
    explainable = fxshap.make_explainable(model)
    file = io.BytesIO()
    torch.save(explainable.state_dict(), file)
    file.seek(0)
    other = fxshap.make_explainable(Model(seed=5))
    before = values(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_values(values(other), values(explainable))
    assert not np.array_equal(values(other)[0], before[0])


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


# --- edited after make_explainable ----------------------------------------------------------------


def another_layer(model: Model) -> None:
    model.hidden = nn.Linear(4, 8).double()


def another_kind_of_layer(model: Model) -> None:
    model.act = nn.Softplus().double()


def wider(model: Model) -> None:
    model.hidden, model.head = nn.Linear(4, 5).double(), nn.Linear(5, 2).double()
    model.norm = nn.BatchNorm1d(5).double().eval()


def without_a_layer(model: Model) -> None:
    model.norm = nn.Identity()


def trained_and_back(model: Model) -> None:
    model.train()
    model(data(9, 7))
    model.eval()


def frozen(model: Model) -> None:
    model.requires_grad_(False)


EDITS = [another_layer, another_kind_of_layer, wider, without_a_layer, trained_and_back, frozen]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edited_after_an_explanation(model, edit):
    explainable = fxshap.make_explainable(model)
    values(explainable)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        edit(model)
    assert_as_new(explainable)


@pytest.mark.parametrize("eval_", ["explainable", "model"])
def test_modes_toggled_through_either(model, eval_):
    """SHAP explains in evaluation mode, whatever was before."""
    explainable = fxshap.make_explainable(model)
    expected = values(explainable)
    (explainable if eval_ == "model" else model).train()
    assert_same_values(values(explainable), expected)
    assert not model.training and not model.drop.training


def old_weight_norm(model: Model) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.hidden)


PARAMETRIZATIONS: dict[str, tuple[Callable[[Model], Any], Callable[[Model], Any]]] = {
    "weight_norm": (
        lambda model: parametrizations.weight_norm(model.hidden),
        lambda model: parametrize.remove_parametrizations(model.hidden, "weight"),
    ),
    "spectral_norm": (
        lambda model: parametrizations.spectral_norm(model.hidden).eval(),
        lambda model: parametrize.remove_parametrizations(model.hidden, "weight"),
    ),
    "old weight_norm": (
        old_weight_norm, lambda model: nn.utils.remove_weight_norm(model.hidden)
    ),
    "pruned": (
        lambda model: prune.l1_unstructured(model.hidden, "weight", 0.5),
        lambda model: prune.remove(model.hidden, "weight"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_parametrization_added_and_removed(model, name):
    add, remove = PARAMETRIZATIONS[name]
    explainable = fxshap.make_explainable(model)
    values(explainable)
    for edit in (add, remove):
        edit(model)
        found = assert_exact(model, explainable, [REFERENCES], [SAMPLES], 1e-13)
        assert_same_values(found, values(fxshap.make_explainable(model)))
    with torch.no_grad():
        model.hidden.weight.mul_(2)
    assert_as_new(explainable)


# --- odd backgrounds and samples ------------------------------------------------------------------


class Image(nn.Module):
    """A small image network of one output, in a layout of its own."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.convolution(x)).amax((2, 3)))


def images(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 5, 6, generator=generator, dtype=torch.float64)


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
    "expanded features": lambda x: x[:, :, :, :1].expand(-1, -1, -1, 6),
    "every other row": lambda x: x[::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels last of one row": lambda x: x[:1].contiguous(memory_format=torch.channels_last),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "not a leaf": lambda x: x.clone().requires_grad_() * 1,
    "inference mode": inference,
    "a parameter": lambda x: nn.Parameter(x.clone()),
}


@pytest.mark.parametrize("what", ["references", "samples", "both"])
@pytest.mark.parametrize("name", STRANGE)
def test_tensors_of_every_kind(name, what):
    references, samples = images(6, 1), images(3, 2)
    if what != "samples":
        references = STRANGE[name](references)
    if what != "references":
        samples = STRANGE[name](samples)
    plain = [x.detach().clone().contiguous() for x in (references, samples)]
    model = Image()
    found = explain(fxshap.make_explainable(model), [references], [samples])
    expected = explain(fxshap.make_explainable(model), plain[:1], plain[1:])
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-13)
    for given in (references, samples):
        assert not given.is_leaf or given.grad is None


@pytest.mark.parametrize("samples", [1, 3])
def test_one_reference(model, samples):
    explainable = fxshap.make_explainable(model)
    assert_exact(model, explainable, [REFERENCES[:1]], [SAMPLES[:samples]], 1e-13)


def test_one_feature():
    model = nn.Sequential(nn.Linear(1, 5), nn.GELU(), nn.Linear(5, 1)).double()
    x, references = data(3, 4)[:, :1], data(4, 5)[:, :1]
    (phi,) = assert_exact(model, fxshap.make_explainable(model), [references], [x], 1e-13)
    with torch.no_grad():
        np.testing.assert_allclose(phi[:, 0], model(x) - model(references).mean(0), atol=1e-13)


def test_no_samples(model):
    explainable = fxshap.make_explainable(model)
    explainer = shap.DeepExplainer(explainable, REFERENCES)
    assert explainer.shap_values(SAMPLES[:0], check_additivity=False).shape == (0, 4, 3)
    assert_as_new(explainable)


def test_no_references_are_refused(model):
    explainable = fxshap.make_explainable(model)
    with pytest.raises(InputError, match="the background has no rows"):
        shap.DeepExplainer(explainable, REFERENCES[:0]).shap_values(SAMPLES)
    assert_as_new(explainable)


def test_ten_thousand_references(model):
    found = explain(fxshap.make_explainable(model), [data(10_000, 1)], [SAMPLES[:1]])
    chunked = fxshap.make_explainable(model, reference_chunk=999)
    np.testing.assert_allclose(
        found[0], explain(chunked, [data(10_000, 1)], [SAMPLES[:1]])[0], rtol=0, atol=1e-13
    )


def test_an_output_of_one_column(model):
    one = fxshap.make_explainable(model, output=1)
    (found,), (whole,) = values(one), values(fxshap.make_explainable(model))
    np.testing.assert_allclose(found[..., 0], whole[..., 1], rtol=0, atol=1e-13)


class Constant(nn.Module):
    """Outputs that do not depend on the input: all of them, or one of two."""

    def __init__(self, partly: bool) -> None:
        super().__init__()
        self.bias, self.partly = nn.Parameter(torch.ones(2).double()), partly

    def forward(self, x: Tensor) -> Tensor:
        still = self.bias.exp().expand(len(x), 2)
        return torch.cat([still, x.square()[:, :1]], 1) if self.partly else still


@pytest.mark.parametrize("partly", [False, True])
def test_outputs_that_do_not_depend_on_the_input(partly):
    model = Constant(partly)
    (found,) = assert_exact(model, fxshap.make_explainable(model), [REFERENCES], [SAMPLES], 1e-13)
    assert not found[..., :2].any()
    assert not partly or found[..., 2].any()


def test_an_input_that_is_not_used():
    class Ignores(nn.Module):
        def forward(self, unused: Tensor, x: Tensor) -> Tensor:
            return x.tanh()

    found = assert_exact(
        Ignores(), fxshap.make_explainable(Ignores()), [REFERENCES] * 2, [SAMPLES] * 2, 1e-13
    )
    assert not found[0].any() and found[1].any()


# --- NaN and infinity -----------------------------------------------------------------------------

BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["sample", "references"])
def test_the_input_with_nan_is_named(where, value):
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * b

    inputs = {"references": [REFERENCES, data(6, 4)], "sample": [SAMPLES, data(3, 5)]}
    inputs[where][1][0, 1] = value
    explainable = fxshap.make_explainable(Two())
    with pytest.raises(InputError, match=rf"input 1 of the {where} contains NaN or infinity \(row"):
        explain(explainable, inputs["references"], inputs["sample"], check_additivity=False)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["hidden.weight", "head.bias", "norm.weight"])
@pytest.mark.parametrize("captured", [False, True], ids=["before capture", "after capture"])
def test_the_weight_with_nan_is_named(model, captured, name, value):
    explainable = fxshap.make_explainable(model)
    if captured:
        values(explainable)
    kept = model.get_parameter(name).detach().clone()
    model.get_parameter(name).data[1] = value
    with pytest.raises(WeightError, match=rf"'{name}' contains (NaN|infinity)"):
        shap.DeepExplainer(explainable, REFERENCES).shap_values(SAMPLES, check_additivity=False)
    model.get_parameter(name).data.copy_(kept)
    assert_as_new(explainable)


@pytest.mark.parametrize("name", ["norm.running_mean", "norm.running_var"])
def test_the_buffer_with_nan_is_named(model, name):
    model.get_buffer(name)[2] = torch.nan
    with pytest.raises(WeightError, match=rf"'{name}' contains NaN"):
        shap.DeepExplainer(fxshap.make_explainable(model), REFERENCES).shap_values(
            SAMPLES, check_additivity=False
        )


class Masked(nn.Module):
    """Attention weights with a mask of -inf, which is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0, 0.0]).double())

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.mask).softmax(1) * x


def test_masks_of_minus_infinity_are_no_error():
    assert_exact(Masked(), fxshap.make_explainable(Masked()), [REFERENCES], [SAMPLES], 1e-13)


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.square(), x.log()], 1)


def test_an_output_with_nan_is_named():
    """The others have attributions."""
    explainable = fxshap.make_explainable(Logarithm())
    references, samples = REFERENCES.abs() + 0.1, SAMPLES.abs() + 0.1
    samples[1, 2] = 0
    with pytest.raises(OutputError, match=r"output 6 of the sample is NaN or infinity"):
        explain(explainable, [references], [samples], check_additivity=False)
    references[4, 0] = -1
    with pytest.raises(OutputError, match=r"output 4 of the references .* \(row 4\)"):
        explain(explainable, [references], [samples], check_additivity=False)
    squares = fxshap.make_explainable(Logarithm(), output=lambda y: y[:, :4])
    explain(squares, [references], [samples])


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("refine", [0, 2])
def test_the_same_call_gives_the_same_bits(model, threads, refine):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        explainable = fxshap.make_explainable(model, refine=refine)
        first = values(explainable)
        assert_same_values(values(explainable), first)
        assert_same_values(values(fxshap.make_explainable(Model(), refine=refine)), first)
        assert_same_values(values(copy.deepcopy(explainable)), first)
        assert_same_values(values(pickle.loads(pickle.dumps(explainable))), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_images_give_the_same_bits(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = Image()
        runs = [
            explain(fxshap.make_explainable(model), [images(40, 1)], [images(2, 2)])
            for _ in range(2)
        ]
        assert_same_values(*runs)
    finally:
        torch.set_num_threads(before)
