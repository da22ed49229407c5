"""Fixtures of several end-to-end tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.end_to_end.small_models import SAMPLES, Model


@pytest.fixture
def model() -> Model:
    model = Model()
    F.cross_entropy(model(SAMPLES), torch.tensor([0, 1, 2])).backward()  # gradients to keep
    return model
