"""Time unmodified SHAP on explainable networks in one line of JSON, to compare two checkouts.

Run in each checkout, A B A B::

    python -m tests.tools.shap_time
"""

from __future__ import annotations

import importlib
import json
import statistics
import time

import shap
import torch

import fxshap
from tests.tools.attributions import networks

try:
    workloads = importlib.import_module("benchmarks.performance.workloads")
except ModuleNotFoundError:  # a commit before the benchmarks moved
    workloads = importlib.import_module("benchmarks.models.workloads")

ROUNDS, SAMPLES = 5, 4


def seconds(model: torch.nn.Module, background: list[torch.Tensor], x: list[torch.Tensor]) -> float:
    """Return the median seconds of explaining some samples, after a first call."""
    one = len(background) == 1
    explainable = fxshap.make_explainable(model.eval(), progress=False)
    explainer = shap.DeepExplainer(explainable, background[0] if one else background)
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        explainer.shap_values(x[0] if one else x, check_additivity=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Time every network."""
    torch.set_num_threads(1)
    found = {}
    for name, work in workloads.WORKLOADS.items():
        if name in ("ResNet-50", "MiniLM", "resnet50", "minilm"):
            continue
        torch.manual_seed(0)
        model = work.build()
        found[name] = seconds(
            model, [torch.randn(work.references, *work.shape)], [torch.randn(SAMPLES, *work.shape)]
        )
    for name in list(networks.NETWORKS)[::8]:
        network = networks.NETWORKS[name]
        found[name] = seconds(
            network.build(), list(network.inputs(20, seed=1)), list(network.inputs(SAMPLES, seed=2))
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
