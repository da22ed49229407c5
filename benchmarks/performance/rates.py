"""How many samples a second every method explains on the device.

All methods explain the same samples in one process, in turns (A B A B ...). A method that is too
slow for all samples explains the first of them, and its rate counts as that of all.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.performance import methods as m
from benchmarks.performance.results import Results, short
from benchmarks.performance.workloads import WORKLOADS, Workload
from fxshap.verification.metrics import additivity_error

NETWORKS = (
    "tabular MLP", "dilated convolutions", "CNN", "transformer", "ResNet-50", "MiniLM",
)  # fmt: skip
#: The network that is also timed compiled, once all others are done, if so many seconds are left.
COMPILED_NETWORK, COMPILED_SECONDS = "transformer", 45.0


@dataclass(frozen=True)
class Settings:
    """How long and how much to time.

    Attributes
    ----------
    device : torch.device
    samples : int
        The most samples that a method explains.
    turn : float
        About how many seconds a method takes in each round.
    rounds : int
    large : bool
        Whether images and the number of references are as people use them, not as few as can be.
    """

    device: torch.device
    samples: int = 256
    turn: float = 0.8
    rounds: int = 3
    large: bool = True


@dataclass
class Timing:
    """One method on one network."""

    explain: m.Explain
    facts: dict[str, Any]
    samples: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def each(self) -> list[float]:
        """Seconds per sample in every round."""
        return [seconds / self.samples for seconds in self.seconds]


def measure(settings: Settings, results: Results, seconds: float, networks: list[str]) -> None:
    """Time all networks; each gets the same share of the time that is left."""
    end = time.monotonic() + seconds
    for index, name in enumerate(networks):
        share = (end - time.monotonic()) / (len(networks) - index)
        if share <= 1:
            results.add("note", text=f"{name} was not timed: the time was over.")
            continue
        guarded(results, name, settings, m.METHODS, share)
    left = end - time.monotonic()
    if COMPILED_NETWORK in networks and left > COMPILED_SECONDS:
        chosen = {m.STOCK: m.METHODS[m.STOCK], m.COMPILED: m.COMPILED_METHOD}
        guarded(results, COMPILED_NETWORK, settings, chosen, left)


def guarded(
    results: Results, name: str, settings: Settings, chosen: dict[str, m.Method], seconds: float
) -> None:
    """Time a network; a failure becomes a row."""
    try:
        measure_network(name, settings, chosen, results, seconds)
    except Exception as error:
        results.add("speed", network=name, method="-", error=short(error))
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()


def workload(name: str, settings: Settings) -> Workload:
    """Return a workload; on a GPU ResNet-50 with images of 224 x 224 and 20 references."""
    work = WORKLOADS[name]
    if not settings.large:
        return replace(work, references=2)
    if name == "ResNet-50" and settings.device.type != "cpu":
        work = replace(work, shape=(3, 224, 224), references=20)
    return work


def prepare(work: Workload, settings: Settings) -> tuple[nn.Module, Tensor, Tensor, int]:
    """Build a network with its references and samples on the device."""
    torch.manual_seed(0)
    model = work.build().eval()
    shape = work.shape
    references, samples = (torch.randn(n, *shape) for n in (work.references, settings.samples))
    model, references, samples = (x.to(settings.device) for x in (model, references, samples))
    with torch.no_grad():
        outputs = model(samples[:2]).shape[1]
    return model, references, samples, outputs


def measure_network(
    name: str,
    settings: Settings,
    chosen: dict[str, m.Method],
    results: Results,
    seconds: float,
) -> None:
    """Time a network with all methods in turns, and write a row for each."""
    end = time.monotonic() + seconds
    work = workload(name, settings)
    model, references, samples, outputs = prepare(work, settings)
    timings: dict[str, Timing] = {}
    for method, make in chosen.items():
        if time.monotonic() > end - 0.3 * seconds and timings:
            results.add("note", text=f"{name} was not timed with {method}: the time was over.")
            continue
        own = fresh(work, settings) if method not in m.EXACT else model
        try:
            explain = make(own, references, outputs)
            timings[method] = start(explain, method, model, references, samples, settings)
        except Exception as error:
            results.add("speed", network=name, method=method, error=short(error))
    for _ in range(settings.rounds):
        for timing in timings.values():
            part = samples[: timing.samples]
            call = timing.explain
            timing.seconds.append(m.timed(lambda call=call, part=part: call(part), settings.device))
        if time.monotonic() > end:
            break
    for method, timing in timings.items():
        results.add("speed", network=name, method=method, **row(timing, timings, settings))


def fresh(work: Workload, settings: Settings) -> nn.Module:
    """Build the network again: other tools leave their hooks on it."""
    torch.manual_seed(0)
    return work.build().eval().to(settings.device)


def start(
    explain: m.Explain,
    method: str,
    model: nn.Module,
    references: Tensor,
    samples: Tensor,
    settings: Settings,
) -> Timing:
    """Warm a method up, measure what it is off, and choose how many samples it explains."""
    few = samples[: min(2, len(samples))]
    values = explain(few)  # captures, compiles, allocates
    facts: dict[str, Any] = {"additivity": error_of(model, references, few, values)}
    if settings.device.type == "cuda":
        facts["waits"] = waits_of(lambda: explain(few)) / (len(few) * values.shape[-1])
        if method in m.EXACT:
            with tf32(True):
                facts["additivity_tf32"] = error_of(model, references, few, explain(few))
    timing = Timing(explain, facts, len(few))
    taken = m.timed(lambda: explain(few), settings.device)
    for _ in range(2):  # more samples take less time each
        wanted = int(timing.samples * settings.turn / taken)
        count = max(min(wanted, len(samples)), 1)
        if count <= 1.5 * timing.samples:
            timing.samples = min(timing.samples, count)
            break
        timing.samples = count
        part = samples[:count]
        explain(part)
        taken = m.timed(lambda part=part: explain(part), settings.device)
    return timing


def error_of(model: nn.Module, references: Tensor, samples: Tensor, values: Tensor) -> float:
    """Return the additivity error of attributions, relative to the largest output."""
    # Without gradients torch runs a fused encoder layer, whose output on CUDA is another.
    torch.backends.mha.set_fastpath_enabled(False)
    error = float(additivity_error(model, references, samples, [values.numpy()]))
    torch.backends.mha.set_fastpath_enabled(True)
    return error


def row(timing: Timing, timings: dict[str, Timing], settings: Settings) -> dict[str, Any]:
    """Return the figures of a method: its rate, and how many times that of SHAP it is."""
    facts = {
        **timing.facts,
        "samples": timing.samples,
        "of": settings.samples,
        "seconds": timing.seconds,
        "per_second": 1 / statistics.median(timing.each),
    }
    stock = timings.get(m.STOCK)
    if stock is not None and stock is not timing:
        ratios = [a / b for a, b in zip(stock.each, timing.each, strict=True)]
        facts["ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return facts


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def waits_of(run: Callable[[], object]) -> int:
    """Count how often a call waits for the GPU, as PyTorch reports it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)
