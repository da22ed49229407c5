"""Random networks through unmodified SHAP: 200 of them, the same in every run.

``make fuzz`` goes through 10,000, of more steps and on more data.
"""

from __future__ import annotations

import gc
import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzzing.exactness import check_exact
from tests.fuzzing.networks import Data, Network, Step
from tests.fuzzing.strategies import datasets, networks

CHUNKS, SIZE = 20, 10


@pytest.fixture(autouse=True)
def quick():
    """Every capture collects garbage, and need not look at what the other tests have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_networks_are_explained_exactly(chunk: int) -> None:
    """Additive to 1e-9 in float64, the plain forward untouched, every node in the report."""
    outcomes: list[str] = []

    @seed(chunk)
    @settings(
        max_examples=SIZE,
        phases=[Phase.generate],  # make fuzz shrinks
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(small=True), datasets())
    def check(network: Network, data: Data) -> None:
        outcomes.extend(check_exact(network, [data]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what the networks are made of
        check()
    assert len(outcomes) == SIZE
    assert outcomes.count("exact") >= SIZE / 2


# --- what it has found ----------------------------------------------------------------------------


def test_what_batch_norm_returns_for_training_is_empty() -> None:
    """It was taken for the output where a network used both."""
    step = Step(
        "op _native_batch_norm_legit_no_training", options={"variant": 0, "how": "smoothly"}
    )
    assert check_exact(Network((step,)), [Data(rows=1)]) == ["exact"]
