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

import captum.attr
import torch
from tangermeme.deep_lift_shap import deep_lift_shap
from torch import Tensor, nn

import fxshap
from benchmarks.adapters import TANGERMEME_OPS, Flat, with_fxshap, with_shap

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


def with_captum(model: nn.Module, references: Tensor, outputs: int) -> Explain:
    """Explain with Captum's DeepLiftShap, output by output, some samples at a time."""
    method = captum.attr.DeepLiftShap(model)

    def explain(samples: Tensor, at_once: int) -> Tensor:
        parts = [
            torch.stack(
                [method.attribute(part, references, k).detach().cpu() for k in range(outputs)], -1
            )
            for part in samples.split(at_once)
        ]
        return torch.cat(parts).flatten(1, -2)

    return at_best_batch(explain)


def with_tangermeme(model: nn.Module, references: Tensor, outputs: int) -> Explain:
    """Explain with tangermeme's deep_lift_shap, output by output, from its multipliers."""
    flat = Flat(model, [tuple(references.shape[1:])])
    r = references.flatten(1)

    def explain(samples: Tensor, at_once: int) -> Tensor:
        x = samples.flatten(1)
        change = (x.unsqueeze(1) - r).cpu()
        columns = []
        for target in range(outputs):
            multipliers = deep_lift_shap(
                flat,
                x.unsqueeze(1),
                target=target,
                references=r.expand(len(x), *r.shape).unsqueeze(2),
                batch_size=at_once * len(r),
                additional_nonlinear_ops=TANGERMEME_OPS,
                warning_threshold=math.inf,
                raw_outputs=True,
                only_warn=True,
                device=x.device.type,
            )
            columns.append((multipliers.squeeze(2) * change).mean(1))
        return torch.stack(columns, dim=-1).detach()

    return at_best_batch(explain)


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
    "tangermeme": with_tangermeme,
    "Captum": with_captum,
}

#: Timed besides, for one network.
COMPILED_METHOD = single_input(with_fxshap, compile=True)
#: Those whose attributions must add up.
EXACT = (OURS, EXPLAINER, COMPILED)
