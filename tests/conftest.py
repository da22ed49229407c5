"""Settings shared by all tests."""

import gc
from collections.abc import Iterator

import pytest
import torch

# pytest-xdist runs one worker per core; threads inside the workers would only compete.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep what was imported, and the tests, from the collections of garbage that captures make."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Do the same with what the tests of a file leave, as what torch caches."""
    yield
    gc.collect()
    gc.freeze()
