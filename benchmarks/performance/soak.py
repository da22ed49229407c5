"""Soak: thousands of SHAP calls on one explainable model, and hundreds of models.

``python -m benchmarks.performance.soak`` prints how resident memory, the number of hooks and the
time of a call change from the first calls to the last.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import shap
import torch
from torch import nn
from tqdm import trange

import fxshap
from benchmarks.adapters import with_fxshap, with_shap
from tests.tools.pages import replace_section

#: Most growth of resident memory, in MB per 1,000 calls.
MOST_GROWTH = 1.0
#: Calls or models before anything is measured.
WARM_UP = 0.1


def main(arguments: list[str] | None = None) -> int:
    """Soak; return 1 if memory, hooks or times grow."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.performance.soak", description=__doc__
    )
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--page", type=Path, help="write the figures into this page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    calls, calls_hold = soak_calls(options.calls)
    text = f"{calls}\n\n{soak_models(options.models)}"
    text += f" ({datetime.date.today()}, torch {torch.__version__}, shap {shap.__version__})"
    print(text)
    if options.page:
        replace_section(options.page, "soak", text)
    return int(not calls_hold)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2)).eval()


def soak_calls(count: int) -> tuple[str, bool]:
    """Call SHAP on one explainable model; return the figures and whether nothing grows."""
    explainable = fxshap.make_explainable(network())
    explain = with_shap(explainable, [torch.randn(10, 8)], 2, check_additivity=True)
    samples = torch.randn(count, 1, 8)
    memory, seconds = measured(lambda k: explain([samples[k]]), count, "call")
    slope = growth(memory) * 1000
    tenth = count // 10
    first, last = (
        statistics.median(part) for part in (seconds[tenth : 2 * tenth], seconds[-tenth:])
    )
    hooks = number_of_hooks(explainable)
    text = (
        f"{count:,} SHAP calls on one explainable model: resident memory grows by {slope:.3f} MB "
        f"per 1,000 calls (at most {MOST_GROWTH:g}), a call takes {first * 1e3:.2f} ms of "
        f"processor time in the second tenth of them and {last * 1e3:.2f} ms in the last, and "
        f"{hooks} hooks are left."
    )
    return text, slope < MOST_GROWTH and not hooks and last < 1.5 * first


def soak_models(count: int) -> str:
    """Make, explain and drop models; return the memory that is left, also of torch.export."""
    x, background = torch.randn(1, 8), torch.randn(10, 8)

    def explain(k: int) -> None:
        with_fxshap(network(), [background], 2, check_additivity=True)([x])

    def export(k: int) -> None:
        rows = {0: torch.export.Dim.AUTO}
        torch.export.export(network(), (background,), dynamic_shapes=(rows,), strict=False)

    ours, _ = measured(explain, count, "model")
    gc.collect()
    exported, _ = measured(export, count, "export")
    return (
        f"{count:,} models made, explained and dropped: resident memory grows by "
        f"{growth(ours) * 1000:.0f} KB a model, and by {growth(exported) * 1000:.0f} KB where the "
        "same models are only given to torch.export, which keeps part of what it has traced."
    )


def measured(
    step: Callable[[int], object], count: int, unit: str
) -> tuple[list[float], list[float]]:
    """Return resident memory in MB after every step, and its seconds of processor time."""
    memory, seconds = [], []
    for k in trange(count, unit=unit, disable=not sys.stderr.isatty()):
        start = time.process_time()  # what else the machine does is no growth
        step(k)
        seconds.append(time.process_time() - start)
        memory.append(resident())
    return memory, seconds


def resident() -> float:
    """Return the resident memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(memory: list[float]) -> float:
    """Return the slope of a straight line through the memory after the warm-up, in MB a step."""
    steady = memory[int(WARM_UP * len(memory)) :]
    return float(np.polyfit(np.arange(len(steady)), steady, 1)[0])


def number_of_hooks(explainable: fxshap.ExplainableModule) -> int:
    """Count the hooks on every module."""
    modules = list(explainable.modules())
    tables = [value for m in modules for name, value in vars(m).items() if name.endswith("_hooks")]
    return sum(len(table) for table in tables if isinstance(table, dict))


if __name__ == "__main__":
    sys.exit(main())
