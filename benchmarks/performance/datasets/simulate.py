"""A simulation of jobs on many workers, from the figures of one machine.

Workers take parts in their order. The driver hands out one part after another, and the storage
serves one request after another, at its bandwidth; so both can become the bottleneck.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """The measured figures, and what is assumed of the storage.

    Attributes
    ----------
    sample : float
        Seconds of a worker per sample.
    spread : float
        The standard deviation of the seconds of a part, over their mean.
    start : float
        Seconds until a worker is ready.
    part : float
        Seconds of the driver per part.
    transferred : float
        Bytes read and written per sample.
    bandwidth : float
        Bytes per second of the storage that all workers share.
    """

    sample: float
    spread: float
    start: float
    part: float
    transferred: float
    bandwidth: float


@dataclass(frozen=True)
class Outcome:
    """What a simulated job takes.

    Attributes
    ----------
    seconds : float
    efficiency : float
        The share of all workers' time in which they explain samples.
    bottleneck : str
        What is busy for most of the time.
    """

    seconds: float
    efficiency: float
    bottleneck: str


def simulate(costs: Costs, rows: int, workers: int, rows_per_part: int) -> Outcome:
    """Simulate a job.

    Parameters
    ----------
    costs : Costs
    rows, workers, rows_per_part : int
    """
    rng = random.Random(0)
    parts = -(-rows // rows_per_part)
    ready = [(costs.start, worker) for worker in range(workers)]
    heapq.heapify(ready)
    driver = storage = end = 0.0
    for part in range(parts):
        count = min(rows_per_part, rows - part * rows_per_part)
        at, worker = heapq.heappop(ready)
        driver = max(driver, at) + costs.part
        factor = max(rng.gauss(1, costs.spread), 0.1)
        explained = driver + count * costs.sample * factor
        storage = max(storage, driver) + count * costs.transferred / costs.bandwidth
        done = max(explained, storage)
        end = max(end, done)
        heapq.heappush(ready, (done, worker))
    busy = {
        "the workers": rows * costs.sample / workers / end,
        "the driver": parts * costs.part / end,
        "the storage": rows * costs.transferred / costs.bandwidth / end,
        "the start of the workers": costs.start / end,
    }
    return Outcome(end, busy["the workers"], max(busy, key=lambda name: busy[name]))
