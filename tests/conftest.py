"""Settings shared by all tests."""

import gc
from collections.abc import Iterator

import pytest
import torch

# pytest-xdist runs one worker per core; threads inside the workers would only compete.
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Every capture collects garbage, and need not look at what was there before the file."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
