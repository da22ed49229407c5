"""What refinement is worth: distance to the exact Shapley values against time, on trained networks.

The networks are those of :mod:`benchmarks.accuracy.problems`. Every method explains the same
samples against the same 16 references, all outputs; methods that capture or hook have run once
before. The distance is sum |phi - exact| / sum |exact| over samples, features and outputs. Times
are processor times on one thread, so that other programs do not count.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import math
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

import fxshap
from benchmarks import adapters
from benchmarks.accuracy.dasp import with_dasp
from benchmarks.accuracy.problems import PROBLEMS, Array, Problem
from benchmarks.samplers import Sampler, kernel_values, permutation_values, sampling_values
from tests.tools.pages import replace_section

PAGE = Path("docs/refinement.md")
FIGURE = Path("docs/figures/refinement.png")
#: Processor seconds a sample that a method may take before it is given no more.
LONGEST = 1.5
#: A distance below which there is nothing to gain.
EXACT = 1e-5
#: Seconds at which the methods are compared.
BUDGETS = (0.01, 0.03, 0.1, 0.3, 1.0)

#: Explains samples: returns values of shape (samples, features, outputs).
Explain = Callable[[Tensor], Array]


def one_pass(method: adapters.Method) -> Callable[[Problem, int], Explain]:
    """Return a method that explains a problem in one pass, whatever its setting."""

    def prepare(problem: Problem, _: int) -> Explain:
        explain = method(problem.model, [problem.references], problem.outputs)
        return lambda x: explain([x]).numpy()

    return prepare


def refined(problem: Problem, pairs: int, rule: str = "rescale") -> Explain:
    """Explain with SHAP on the explainable model."""
    method = partial(adapters.with_fxshap, refine=pairs, rule=rule)
    return one_pass(method)(problem, pairs)


def sampled(sampler: Sampler) -> Callable[[Problem, int], Explain]:
    """Return a method that explains the outputs of a problem with one of SHAP's samplers."""

    def prepare(problem: Problem, evaluations: int) -> Explain:
        background = problem.references.flatten(1).numpy()
        return lambda x: sampler(problem.call, background, x.flatten(1).numpy(), evaluations)

    return prepare


def permutations(problem: Problem, count: int) -> Explain:
    """Explain with SHAP's PermutationExplainer, each permutation forwards and backwards."""
    return sampled(permutation_values)(problem, count * (2 * problem.features + 1))


def expected_gradients(problem: Problem, points: int) -> Explain:
    """Explain with SHAP's GradientExplainer, from so many points."""
    method = partial(adapters.with_expected_gradients, points=points)
    return one_pass(method)(problem, points)


def exact(problem: Problem, _: int) -> Explain:
    """Explain with SHAP on the explainable model, from all coalitions."""
    return one_pass(partial(adapters.with_fxshap, refine="exact"))(problem, 0)


def within_budget(problem: Problem, milliseconds: int) -> Explain:
    """Explain with SHAP on the explainable model and ``refine="auto"``."""
    refinement = fxshap.Refinement("auto", budget=milliseconds / 1000)
    return one_pass(partial(adapters.with_fxshap, refine=refinement))(problem, 0)


def powers(first: int, last: int) -> list[int]:
    """Return first, twice that, ... up to last."""
    return [first << k for k in range((last // first).bit_length())]


#: Every method and how much of it to take, one point of its curve after another.
METHODS: dict[str, tuple[Callable[[Problem, int], Explain], list[int]]] = {
    "fxshap, refine": (refined, [0, *powers(1, 64)]),
    "fxshap, variances": (partial(refined, rule="variance"), [0, *powers(1, 64)]),
    "fxshap, exact": (exact, [0]),
    "fxshap, auto": (within_budget, powers(4, 512)),
    "PermutationExplainer": (permutations, powers(1, 1024)),
    "KernelExplainer": (sampled(kernel_values), powers(32, 65536)),
    "SamplingExplainer": (sampled(sampling_values), powers(64, 65536)),
    "expected gradients": (expected_gradients, powers(16, 16384)),
    "integrated gradients": (one_pass(adapters.with_integrated_gradients), [0]),
    "DASP": (one_pass(with_dasp), [0]),
    "SHAP, one pass": (one_pass(adapters.with_shap), [0]),
    "Captum, one pass": (one_pass(adapters.with_captum), [0]),
    "tangermeme, one pass": (one_pass(adapters.with_tangermeme), [0]),
}
#: For every method its settings, each with seconds a sample and the distance.
Curves = dict[str, list[tuple[int, float, float]]]


def measure(problem: Problem) -> Curves:
    """Return the curve of every method, up to what takes longest."""
    curves: Curves = {}
    for name, (method, settings) in METHODS.items():
        curves[name] = []
        for setting in settings:
            if name == "KernelExplainer" and setting < 2 * problem.features:
                continue  # its least squares have no single answer
            warm = not curves[name] or name.startswith("fxshap")
            found = measure_one(problem, method, setting, warm)
            if isinstance(found, str):
                print(f"  {name}: {found}", flush=True)
                break
            curves[name].append((setting, *found))
            if found[0] > LONGEST or found[1] < EXACT:
                break
        print(
            f"  {name}: {[(s, round(t, 4), round(d, 4)) for s, t, d in curves[name]]}", flush=True
        )
    return curves


def measure_one(
    problem: Problem, method: Callable[[Problem, int], Explain], setting: int, warm: bool
) -> tuple[float, float] | str:
    """Return the seconds a sample and the distance, or why there are none."""
    try:
        copied = copy.copy(problem)
        copied.model = copy.deepcopy(problem.model)  # some methods leave hooks behind
        np.random.seed(0)
        explain = method(copied, setting)
        if warm:
            explain(copied.samples[:1])  # what is captured or compiled once
        start = time.process_time()
        values = np.concatenate([explain(sample) for sample in copied.samples.split(1)])
        seconds = (time.process_time() - start) / len(copied.samples)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return seconds, problem.distance(values)


def within(curve: list[tuple[int, float, float]], budget: float) -> float:
    """Return the distance of the latest point of a curve within a time."""
    return next((d for _, seconds, d in reversed(curve) if seconds <= budget), math.nan)


@dataclass
class Outcome:
    """What was measured of one problem."""

    name: str
    accuracy: float
    error: float
    curves: Curves


def outcomes(results: Path) -> list[Outcome]:
    """Measure every problem, and go on where a run was stopped."""
    lines = results.read_text().splitlines() if results.exists() else []
    found = {outcome.name: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}
    for name, make in PROBLEMS.items():
        if name not in found:
            problem = make()
            print(f"{name}: accuracy {problem.accuracy:.3f}, truth to {problem.error:.4f}")
            found[name] = Outcome(name, problem.accuracy, problem.error, measure(problem))
            with results.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(found[name])) + "\n")
    return [found[name] for name in PROBLEMS]


def nearest_table(found: list[Outcome]) -> str:
    """Tabulate the distance of every method within the same times."""
    rows = []
    for outcome in found:
        curves = outcome.curves
        cells = {name: [within(curve, b) for b in BUDGETS] for name, curve in curves.items()}
        best = [min((d[i] for d in cells.values() if d[i] == d[i]), default=math.nan)
                for i in range(len(BUDGETS))]  # fmt: skip
        for number, (name, distances) in enumerate(cells.items()):
            shown = [
                "-" if d != d else f"**{d:.4f}**" if d == b else f"{d:.4f}"
                for d, b in zip(distances, best, strict=True)
            ]
            rows.append([outcome.name if number == 0 else "", name, *shown])
    header = ["", "method", *(f"{b:g} s" for b in BUDGETS)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def draw(found: list[Outcome]) -> None:
    """Draw the curves of every problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 7.2), layout="constrained")
    panels = list(axes.flat)
    markers = {name: "o*Xps^vDPdhd<>"[number] for number, name in enumerate(METHODS)}
    for panel, problem in zip(panels, found, strict=False):
        for name, curve in problem.curves.items():
            if not curve:
                continue
            _, seconds, distances = zip(*curve, strict=True)
            ours = name.startswith("fxshap")
            panel.plot(
                seconds, np.maximum(distances, 1e-6), marker=markers[name], label=name,
                markersize=5 if len(curve) > 1 else 8, linewidth=2.2 if ours else 1.2,
                zorder=3 if ours else 2,
            )  # fmt: skip
        if problem.error:
            draw_error(panel, problem.error)
        panel.set(xscale="log", yscale="log", ylim=(1e-4, 3))
        panel.set_title(f"{problem.name} (accuracy {problem.accuracy:.2f})", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set(xlabel="seconds a sample", ylabel="distance to the exact values")
    last = panels[len(found)]
    last.set_axis_off()
    last.legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False)
    for panel in panels[len(found) + 1 :]:
        panel.set_axis_off()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=130)
    plt.close(figure)


def draw_error(panel: Any, error: float) -> None:
    """Draw the error of the true values as a line, with what it is."""
    panel.axhline(error, color="grey", linestyle=":")
    panel.annotate(
        "error of the truth itself", (0.98, error), xytext=(0, 3), ha="right",
        xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8,
    )  # fmt: skip


def main() -> int:
    """Train, measure, draw and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.refinement", description=__doc__
    )
    parser.add_argument("--results", type=Path, help="results of a stopped run, to continue")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = outcomes(options.results or Path(folder, "outcomes.jsonl"))
    draw(found)
    nearest = nearest_table(found)
    print(nearest)
    packages = ("torch", "shap", "captum", "tangermeme", "scikit-learn")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    when = f"`python -m benchmarks.accuracy.refinement`, {datetime.date.today()}, "
    when += f"Python {platform.python_version()}, {versions}, fxshap {fxshap.__version__}."
    chart = "![Distance against time](figures/refinement.png)"
    truth = f"The error of the truth for the digits itself is {found[-1].error:.4f}."
    replace_section(PAGE, "worth", "\n\n".join([when, chart, nearest, truth]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
