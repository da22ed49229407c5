"""Peak memory of an explanation on the CPU, from Linux's own figures, in a fresh process."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxshap


def in_fresh_process(module: str, *arguments: str) -> Any:
    """Run a module in a fresh process and return the JSON in its last line."""
    command = [sys.executable, "-m", module, *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def peak(make: Callable[[], Callable[[], object]]) -> float:
    """Return the peak of the second run of an explanation over what the process held, in MiB.

    Parameters
    ----------
    make : callable
        Returns the explanation, after what is idle has been measured.
    """
    fxshap.make_explainable(nn.ReLU(), torch.zeros(2, 3))  # what capturing imports is not counted
    gc.collect()
    idle = resident("VmRSS")
    explain = make()
    explain()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    explain()
    return resident("VmHWM") - idle


def resident(field: str) -> float:
    """Return a figure of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
