"""The examples in public docstrings run, and print what they show."""

import doctest
import importlib
from unittest import mock

import pytest
import torch

from fxshap.rules import DECOMPOSITIONS, RULES

MODULES = (
    "fxshap._compat",
    "fxshap.datasets.batch",
    "fxshap.datasets.jobs",
    "fxshap.explainer",
    "fxshap.frontend.bound",
    "fxshap.integrations.detect",
    "fxshap.module",
    "fxshap.rules",
    "fxshap.rules.core.operation",
    "fxshap.rules.products",
    "fxshap.rules.core.registry",
    "fxshap.rules.elementwise",
    "fxshap.verification.shapley",
    "fxshap.runtime.coalitions",
    "fxshap.runtime.exact",
    "fxshap.runtime.features",
    "fxshap.runtime.refinement",
    "fxshap.testing",
    "fxshap.verification.verify",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    with mock.patch.dict(RULES), mock.patch.dict(DECOMPOSITIONS), torch.random.fork_rng():
        result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
