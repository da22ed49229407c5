"""Nothing outside is changed: no patches, no files, nothing executed that PyTorch would not."""

from __future__ import annotations

import io
import pickle
import sys
from types import ModuleType
from typing import Any

import pytest
import shap
import torch
from click.testing import CliRunner
from shap.explainers._deep import deep_pytorch
from torch import nn

import fxshap
from fxshap.cli import cli

OWNERS: list[Any] = [
    nn.Module, nn.Linear, nn.ReLU, nn.functional, nn.modules.module, torch, torch.Tensor,
    torch.autograd, torch.autograd.Function, shap, shap.DeepExplainer, deep_pytorch,
    deep_pytorch.PyTorchDeep,
]  # fmt: skip


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)).eval()


def explain(explainable: nn.Module) -> Any:
    background = torch.linspace(-1, 1, 20).reshape(5, 4)
    return shap.DeepExplainer(explainable, background).shap_values(background[:2] + 1)


def attributes(owner: Any) -> dict[str, int]:
    """The attributes of a module or a class by identity, without submodules imported late."""
    return {name: id(v) for name, v in vars(owner).items() if not isinstance(v, ModuleType)}


def test_nothing_of_torch_or_shap_is_patched():
    explain(fxshap.make_explainable(network()))  # what torch itself sets up at the first export
    before = [attributes(owner) for owner in OWNERS]
    explainable = fxshap.make_explainable(network(), refine=1)
    explain(explainable)
    explainable.report()
    with fxshap.multiplier_mode():
        explainable(torch.randn(2, 4, requires_grad=True))
    for owner, expected in zip(OWNERS, before, strict=True):
        assert attributes(owner) == expected, owner


def test_settings_of_torch_stay():
    def settings() -> list[Any]:
        return [
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(), torch.is_inference_mode_enabled(),
            torch.is_anomaly_enabled(), list(sys.path), sys.excepthook,
        ]  # fmt: skip

    before = settings()
    explain(fxshap.make_explainable(network()))
    assert settings() == before


def test_no_files_are_written_and_no_connections_made():
    """Python tells every attempt; the hook cannot be removed, so it only listens for a while."""
    seen: list[Any] = []
    listening = [True]

    def listen(event: str, args: tuple[Any, ...]) -> None:
        if not listening:
            return
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or event.startswith(("socket.connect", "os.mkdir", "os.remove", "subprocess")):
            seen.append((event, args))

    sys.addaudithook(listen)
    try:
        explain(fxshap.make_explainable(network(), refine=1))
    finally:
        listening.clear()
    assert not seen


def test_the_command_line_warns_that_it_runs_the_users_code():
    said = CliRunner().invoke(cli, ["check", "--help"]).output
    assert "Imports PACKAGE.MODULE, which runs its code" in said


class Harmful:
    """Runs code when it is unpickled."""

    ran = False

    def __reduce__(self) -> Any:
        return harm, ()


def harm() -> str:
    Harmful.ran = True
    return "harm"


@pytest.mark.parametrize("captured", [False, True])
def test_weights_only_is_respected(captured):
    explainable = fxshap.make_explainable(network())
    if captured:
        explain(explainable)
    file = io.BytesIO()
    torch.save(explainable, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights only"):
        torch.load(file, weights_only=True)

    explainable.original_model.extra = Harmful()
    file = io.BytesIO()
    torch.save({"model": explainable}, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    assert not Harmful.ran


def test_loading_runs_no_code_of_ours(monkeypatch):
    """It makes modules and dicts; the model is captured when it is explained."""
    explainable = fxshap.make_explainable(network())
    expected = explain(explainable)
    stored = pickle.dumps(explainable)

    def refuse(*_: Any) -> None:
        raise AssertionError("called while loading")

    for name in ("runtime.captures.capture", "runtime.captures.Engine", "module.make_explainable"):
        monkeypatch.setattr(f"fxshap.{name}", refuse)
    monkeypatch.setattr(fxshap.ExplainableModule, "__init__", refuse)
    monkeypatch.setattr(fxshap.ExplainableModule, "forward", refuse)
    loaded = pickle.loads(stored)
    monkeypatch.undo()
    assert (explain(loaded) == expected).all()
