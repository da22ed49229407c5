"""What a worker does with a part of a data set: read, explain, write, and mark it as done."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from fxshap.datasets.batch import BatchExplainer
from fxshap.datasets.columns import Batch
from fxshap.datasets.manifest import Manifest
from fxshap.datasets.parts import Part
from fxshap.datasets.sinks import Chunk, Sink
from fxshap.datasets.sources import Source
from fxshap.datasets.summary import Summary


@dataclass
class Record:
    """What a worker returns of a part, after it is written.

    Attributes
    ----------
    index, rows : int
    refused : int
        How many rows are not explained.
    model : str
        A digest of the weights of the worker's model.
    seconds : float
        How long the part took.
    build_seconds : float
        How long the worker took to build the model and its explainer.
    worker : int
        The process.
    peak_bytes : int
        The most memory that the process has taken; 0 where the system does not tell.
    """

    index: int
    rows: int
    refused: int
    model: str
    seconds: float
    build_seconds: float
    worker: int
    peak_bytes: int


@dataclass(frozen=True)
class PartWriter:
    """Explains a part, and writes the result and then its summary, which marks it as done.

    Attributes
    ----------
    explainer : BatchExplainer
    source : Source
    sink : Sink
    manifest : Manifest
    below : float
        The limit of the random numbers of rows that the sample can have.
    """

    explainer: BatchExplainer
    source: Source
    sink: Sink
    manifest: Manifest
    below: float

    def __call__(self, part: Part) -> Record:
        """Explain and write a part."""
        start = time.perf_counter()
        summary = Summary(below=self.below)
        self.sink.write(part, self._chunks(part, summary))
        summary.save(self.manifest.file(part))
        explainer = self.explainer.row_explainer()
        return Record(
            part.index,
            summary.rows,
            summary.refused,
            explainer.digest,
            time.perf_counter() - start,
            explainer.seconds,
            os.getpid(),
            peak_bytes(),
        )

    def _chunks(self, part: Part, summary: Summary) -> Iterator[Chunk]:
        """Yield explained rows of the part, and add them to the summary."""
        for start, rows in read_chunks(self.explainer, self.source, part):
            explained = self.explainer.explain(rows, start)
            refused = sorted(explained.reasons)
            summary.add(explained, start, [self.explainer.where(rows, i, start) for i in refused])
            yield Chunk(start, rows, explained.columns)


def read_chunks(
    explainer: BatchExplainer, source: Source, part: Part
) -> Iterator[tuple[int, Batch]]:
    """Yield as many rows of a part as a worker explains at once, with the index of the first."""
    step = explainer.rows_at_once(source.read(part.start, part.start + 1), part.start)
    for start in range(part.start, part.stop, step):
        yield start, source.read(start, min(start + step, part.stop))


def peak_bytes() -> int:
    """Return the most memory that this process has taken; 0 on Windows, which does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # macOS counts in bytes
