"""Save the attributions of every test network, or compare them bit for bit with saved ones.

Save at one commit, compare at another::

    python -m tests.tools.attributions save before.pt
    python -m tests.tools.attributions compare before.pt

Every network is explained by unmodified SHAP in float32 and float64: in one pass, with the variance
rule, and with one pair of coalitions. A difference of one bit makes the second command exit with 1.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

import numpy as np
import shap
import torch

import fxshap

try:
    networks = importlib.import_module("tests.networks")
except ModuleNotFoundError:  # a commit before the networks moved
    networks = importlib.import_module("benchmarks.models")

NEW = "rule" in inspect.signature(fxshap.make_explainable).parameters
OPTIONS: dict[str, dict[str, Any]] = {
    "one pass": {},
    "variance": {"rule": "variance"} if NEW else {"variances": True},
    "refine=1": {"refine": 1},
}


def explain(name: str, dtype: torch.dtype, options: dict[str, Any]) -> list[np.ndarray]:
    """Return SHAP's values of two samples of a network, one array an input."""
    network = networks.NETWORKS[name]
    model = network.build().to(dtype)
    background = list(network.inputs(4, seed=1, dtype=dtype))
    samples = list(network.inputs(2, seed=2, dtype=dtype))
    explainer = shap.DeepExplainer(
        fxshap.make_explainable(model, **options, progress=False),
        background if len(background) > 1 else background[0],
    )
    values = explainer.shap_values(samples if len(samples) > 1 else samples[0])
    return values if isinstance(values, list) else [values]


def explain_all() -> dict[str, list[np.ndarray]]:
    """Return the values of every network, in both types, with every option."""
    torch.set_num_threads(1)
    return {
        f"{name}, {dtype}, {option}": explain(name, dtype, options)
        for name in networks.NETWORKS
        for dtype in (torch.float32, torch.float64)
        for option, options in OPTIONS.items()
    }


def compare(before: dict[str, list[np.ndarray]], now: dict[str, list[np.ndarray]]) -> bool:
    """Print what differs, and a summary; return True if nothing does."""
    differ = 0
    for key in sorted(before.keys() | now.keys()):
        pair = before.get(key), now.get(key)
        if None in pair or not all(map(np.array_equal, *pair)):
            differ += 1
            print(f"{key}: {'differs' if None not in pair else 'is missing on one side'}")
    print(f"{len(now)} explanations compared bit for bit: {differ} differ")
    return not differ


def main() -> None:
    """Run one of the two commands."""
    action, path = sys.argv[1:]
    found = explain_all()
    if action == "save":
        torch.save(found, path)
    elif not compare(torch.load(path, weights_only=False), found):
        sys.exit(1)


if __name__ == "__main__":
    main()
