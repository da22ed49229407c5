"""Long captures and refinements show a bar on a terminal, and nowhere else."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from fxshap.runtime import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.3)
        return torch.tanh(x)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.1)
    monkeypatch.setattr(progress, "INTERVAL", 0.05)


def shown(monkeypatch, stream: io.StringIO, **options: bool) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    fxshap.make_explainable(Slow(), torch.randn(2, 3), **options)
    return stream.getvalue()


def test_a_long_capture_is_shown_on_a_terminal(monkeypatch, quick):
    first, *_, blank, end = shown(monkeypatch, Terminal()).split("\r")[1:]
    assert re.match(r"fxshap captures Slow.*: 00:0\d", first)
    assert blank.strip() == "" and end == ""  # nothing is left behind


def test_a_short_capture_is_not(monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 600)
    assert shown(monkeypatch, Terminal()) == ""


def test_it_can_be_turned_off(monkeypatch, quick):
    assert shown(monkeypatch, Terminal(), progress=False) == ""


def test_a_file_gets_nothing(monkeypatch, quick):
    assert shown(monkeypatch, io.StringIO()) == ""


def test_a_failure_removes_the_bar(monkeypatch, quick):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(ZeroDivisionError), progress.progress_bar("division"):
        time.sleep(0.3)
        raise ZeroDivisionError
    assert "division" in stream.getvalue() and stream.getvalue().endswith("\r")


class Gated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * x.flip(1)


def refined(monkeypatch, **options: bool) -> str:
    stream = Terminal()
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    explainable = fxshap.make_explainable(Gated(), refine=20, **options)
    explainer = shap.DeepExplainer(explainable, torch.randn(5, 3))
    explainer.shap_values(torch.randn(1, 3))  # capture
    monkeypatch.setattr(sys, "stderr", stream)
    explainer.shap_values(torch.randn(1, 3))
    return stream.getvalue()


def test_a_long_refinement_shows_how_far_it_is_and_leaves_nothing(monkeypatch):
    _, *lines, blank, end = refined(monkeypatch).split("\r")[1:]
    assert all(re.match(r"fxshap refines: +\d+%.* \d+/81 ", line) for line in lines if line.strip())
    assert blank.strip() == "" and end == ""


def test_refinement_is_silent_when_turned_off(monkeypatch):
    assert refined(monkeypatch, progress=False) == ""
