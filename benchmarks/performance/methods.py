"""The methods to time, each at its best batch size on the device.

A method takes a model, its references and the number of outputs, and returns a function from
samples to attributions of shape (samples, features, outputs).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fxshap
from benchmarks.adapters import with_captum, with_fxshap, with_shap, with_tangermeme

Explain = Callable[[Tensor], Tensor]
Method = Callable[[nn.Module, Tensor, int], Explain]

#: How many samples against all references Captum and tangermeme may take at once.
SAMPLES_AT_ONCE = (1, 4, 16, 64, 256)
#: Seconds that a larger batch may take while the best one is looked for.
PATIENCE = 1.0


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call, with all that it starts on the device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def single_input(method: Callable[..., Any], **options: Any) -> Method:
    """Return a method of one tensor for a method of a sequence of inputs."""

    def prepare(model: nn.Module, references: Tensor, outputs: int) -> Explain:
        explain = method(model, [references], outputs, **options)
        return lambda samples: explain([samples])

    return prepare


def with_explainer(model: nn.Module, references: Tensor, outputs: int, **options: Any) -> Explain:
    """Explain with fxshap's own explainer, all samples in one call."""
    explainer = fxshap.DeepExplainer(model, references, **options)

    def explain(samples: Tensor) -> Tensor:
        return torch.from_numpy(explainer.shap_values(samples, check_additivity=False)).flatten(
            1, -2
        )

    return explain


def explainer(**options: Any) -> Method:
    """Return the explainer with these options, as a method."""
    return partial(with_explainer, **options)


def with_best_batch(method: Callable[..., Any]) -> Method:
    """Return a method at its best batch size, for one that takes `at_once` samples."""

    def prepare(model: nn.Module, references: Tensor, outputs: int) -> Explain:
        def explain(samples: Tensor, at_once: int) -> Tensor:
            result: Tensor = method(model, [references], outputs, at_once=at_once)([samples])
            return result

        return at_best_batch(explain)

    return prepare


def at_best_batch(explain: Callable[[Tensor, int], Tensor]) -> Explain:
    """Return a method with the number of samples at once that is fastest.

    It is looked for in the first call with as many samples, from small batches to large ones, until
    a sample takes longer, a batch takes too long, or the device is out of memory.
    """
    best: dict[int, int] = {}

    def run(samples: Tensor) -> Tensor:
        count = len(samples)
        if count not in best:
            best[count] = best_batch(partial(try_batch, explain, samples), count)
        return explain(samples, best[count])

    return run


def try_batch(explain: Callable[[Tensor, int], Tensor], samples: Tensor, size: int) -> float:
    """Return the seconds of a batch of `size` samples."""
    part = samples[:size]
    return timed(lambda: explain(part, size), samples.device)


def best_batch(seconds: Callable[[int], float], most: int) -> int:
    """Return the batch size with the fewest seconds per sample."""
    best, least, out_of_memory = 1, math.inf, False
    for size in (size for size in SAMPLES_AT_ONCE if size <= max(most, 1)):
        try:
            seconds(size)  # warms up
            each = seconds(size) / size
        except torch.OutOfMemoryError:
            out_of_memory = True
        if out_of_memory or each > 1.1 * least:
            break
        if each < least:
            best, least = size, each
        if each * size > PATIENCE:
            break
    if out_of_memory:
        torch.cuda.empty_cache()
    return best


STOCK, OURS, EXPLAINER, COMPILED = "SHAP", "SHAP, explainable", "explainer", "SHAP, compiled"

METHODS: dict[str, Method] = {
    STOCK: single_input(with_shap),
    OURS: single_input(with_fxshap),
    EXPLAINER: with_explainer,
    "tangermeme": with_best_batch(with_tangermeme),
    "Captum": with_best_batch(with_captum),
}

#: Timed besides, for one network.
COMPILED_METHOD = single_input(with_fxshap, compile=True)
#: Those whose attributions must add up.
EXACT = (OURS, EXPLAINER, COMPILED)
