"""Run SHAP's own tests of ``DeepExplainer`` for PyTorch with ``fxshap.DeepExplainer`` in its place.

Run ``python -m tests.tools.shap_suite PATH``, where the path is that of
``tests/explainers/test_deep.py`` in a checkout of SHAP's repository. They download a table of
houses. Random numbers of its shape replace it, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import shap

import fxshap

HOUSES = (2000, 8)


class Replacements:
    """A pytest plugin that replaces the explainer and the downloaded table."""

    @pytest.fixture(autouse=True)
    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace them in every test."""
        monkeypatch.setattr(shap, "DeepExplainer", fxshap.DeepExplainer)
        monkeypatch.setattr("sklearn.datasets.fetch_california_housing", houses)

    @pytest.fixture
    def random_seed(self) -> int:
        """Return the seed that SHAP's tests ask for."""
        return 0


def houses(return_X_y: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return random numbers in place of a table of houses and their prices."""
    generator = np.random.default_rng(0)
    return generator.normal(size=HOUSES), generator.normal(size=HOUSES[0])


def main(arguments: list[str] | None = None) -> int:
    """Run the tests."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.shap_suite", description=__doc__)
    parser.add_argument("path", type=Path, help="SHAP's tests/explainers/test_deep.py")
    options = parser.parse_args(arguments)
    # Without SHAP's own conftest, and outside its sources, which have no compiled extensions.
    chosen = ["-k", "pytorch", "--noconftest", "-p", "no:cacheprovider", "-c", "/dev/null"]
    return int(pytest.main([str(options.path), "--rootdir", "/", "-q", *chosen], [Replacements()]))


if __name__ == "__main__":
    sys.exit(main())
