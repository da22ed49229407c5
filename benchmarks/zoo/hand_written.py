"""The hand-written networks of `benchmarks.models`."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.models import NETWORKS
from benchmarks.zoo.entry import Entry, only_tensor


def hand_written_entries() -> Iterator[Entry]:
    """Yield every network of the collection."""
    for name, network in NETWORKS.items():
        yield Entry(
            "hand-written", network.family, name, network.build, network.shapes, only_tensor
        )
