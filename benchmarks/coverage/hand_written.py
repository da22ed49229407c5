"""The hand-written networks of `tests.networks`."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.coverage.entry import Entry, only_tensor
from tests.networks import NETWORKS


def hand_written_entries() -> Iterator[Entry]:
    """Yield every network of the collection."""
    for name, network in NETWORKS.items():
        yield Entry(
            "hand-written", network.family, name, network.build, network.shapes, only_tensor
        )
