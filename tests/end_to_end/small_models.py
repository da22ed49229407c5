"""Small models and their data, shared by several end-to-end tests."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from tests.helpers import assert_exact, assert_no_shap_hooks, assert_same_values, explain, hooks


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


def values(explainable: nn.Module, references: Tensor = REFERENCES) -> list[np.ndarray]:
    return explain(explainable, [references], [SAMPLES])


def assert_as_new(explainable: Any) -> None:
    """Check that it gives what a fresh one of the same model gives, and is clean afterwards."""
    fresh = fxshap.make_explainable(copy.deepcopy(explainable.original_model))
    assert_same_values(values(explainable), values(fresh))
    assert_exact(explainable.original_model, explainable, [REFERENCES], [SAMPLES], 1e-13)
    assert_no_shap_hooks(explainable)
    assert not hooks(explainable._probe)


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
