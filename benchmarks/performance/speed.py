"""How fast unmodified SHAP is on the explainable model, compared with SHAP, Captum and
tangermeme.

All methods explain the same samples against the same references in one process, in turns
(A B A B ...), so that what else the machine does falls on all of them. A ratio is the time of
another method over that of fxshap in the same round; its median and its range are shown. Peak
memory comes from a fresh process for each method. How far the attributions of fxshap are from
adding up is measured on the values that are timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import shap
import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxshap
from benchmarks.adapters import (
    Explain,
    Inputs,
    Method,
    with_captum,
    with_fxshap,
    with_shap,
    with_tangermeme,
)
from benchmarks.performance import growth, memory
from benchmarks.performance.workloads import WORKLOADS, Workload
from fxshap.verification.metrics import additivity_error
from tests.tools.pages import replace_section

MODULE = "benchmarks.performance.speed"
FIGURE = Path("docs/figures/speed.png")
SAMPLES = 2


class Nothing(nn.Module):
    """A model that returns zeros: what is left is SHAP's own loop."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros that depend on the input."""
        return x.flatten(1)[:, :1].expand(-1, self.outputs) * 0.0


def with_nothing(model: nn.Module, references: Inputs, outputs: int) -> Explain:
    """SHAP's own loop."""
    return with_shap(Nothing(outputs), references, outputs)


METHODS: dict[str, Method] = {
    "fxshap": with_fxshap,
    "compiled": partial(with_fxshap, compile=True),
    "SHAP": with_shap,
    "Captum": with_captum,
    "tangermeme": with_tangermeme,
    "SHAP's loop": with_nothing,
    "variances": partial(with_fxshap, rule="variance"),
    "refine=1": partial(with_fxshap, refine=1),
}
#: Those whose attributions must add up.
OURS = ("fxshap", "compiled")
#: Measured when nothing else is asked for.
USUAL = [name for name in METHODS if name not in ("variances", "refine=1")]


def prepare(work: Workload) -> tuple[nn.Module, Tensor, Tensor, int]:
    """Build a network with its references and samples."""
    torch.manual_seed(0)
    model = work.build().eval()
    references, samples = (
        torch.randn(work.references, *work.shape),
        torch.randn(SAMPLES, *work.shape),
    )
    with torch.no_grad():
        outputs = model(samples).shape[1]
    return model, references, samples, outputs


Times = dict[str, list[float]]
Errors = dict[str, float]


def times(work: Workload, methods: dict[str, Method], rounds: int) -> tuple[Times, Errors]:
    """Time every method in every round, in seconds; a method that fails has no times.

    Also return the additivity errors of ours.
    """
    explainers: dict[str, Explain] = {}
    errors: Errors = {}
    for name, method in methods.items():
        model, references, samples, outputs = prepare(work)
        try:
            explain = method(model, [references], outputs)
            values = explain([samples])  # warm up: capture, compile, allocate
            if name in OURS:
                errors[name] = additivity_error(model, references, samples, [values.numpy()])
        except Exception as error:
            tqdm.write(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            continue
        explainers[name] = explain
    found: dict[str, list[float]] = {name: [] for name in explainers}
    for _ in range(rounds):
        for name, explain in explainers.items():
            start = time.perf_counter()
            explain([samples])
            found[name].append(time.perf_counter() - start)
    return found, errors


def peak_memory(name: str, method: str) -> float:
    """Return the peak resident memory of an explanation in a fresh process, in MiB over idle."""
    return float(memory.in_fresh_process(MODULE, "--child", name, method))


def child(name: str, method: str) -> None:
    """Print the peak memory of the explanation of one sample, in MiB."""
    model, references, samples, outputs = prepare(WORKLOADS[name])

    def make() -> Callable[[], object]:
        explain = METHODS[method](model, [references], outputs)
        return lambda: explain([samples[:1]])

    print(json.dumps(memory.peak(make)))


#: ResNet-50 as people use it: images of 224 x 224 pixels and 100 references, so many on a tape.
LARGE = "ResNet-50", (3, 224, 224), 100
LARGE_CHUNK = 50


def large(chunk: int) -> None:
    """Explain one output of one large image; print the peak memory of the process, in MiB."""
    name, shape, count = LARGE
    work = replace(WORKLOADS[name], shape=shape, references=count)
    model, references, samples, _ = prepare(work)
    explainer = shap.DeepExplainer(
        fxshap.make_explainable(model, reference_batch_size=chunk), references
    )
    start = time.perf_counter()
    explainer.shap_values(samples[:1], ranked_outputs=1, check_additivity=False)
    print(json.dumps([memory.resident("VmHWM"), time.perf_counter() - start]))


def measure_large() -> str:
    """Return what the large explanation took, in a fresh process."""
    mebibytes, seconds = memory.in_fresh_process(MODULE, "--large")
    name, shape, count = LARGE
    return (
        f"{name} on {shape[1]} x {shape[2]} pixels against {count} references, {LARGE_CHUNK} on a "
        f"tape: one output of one sample in {seconds:.0f} s, capture and all, with a peak of "
        f"{mebibytes / 1024:.1f} GiB for the whole process."
    )


def ratios(found: Times, other: str, ours: str = "fxshap") -> list[float]:
    """Return another method's time over ours in each round."""
    return [b / a for a, b in zip(found[ours], found[other], strict=True)]


def ratio(found: Times, other: str, ours: str = "fxshap") -> str:
    """Return the median and the range of another method's time over ours."""
    if other not in found or ours not in found:
        return "-"
    each = ratios(found, other, ours)
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


def draw(medians: dict[str, dict[str, float]], path: Path = FIGURE) -> None:
    """Draw how many times longer the other methods take on each network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    others = [name for name in ("SHAP", "Captum", "tangermeme", "compiled") if name in METHODS]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    height = 0.8 / len(others)
    for index, other in enumerate(others):
        positions = [
            row + index * height for row, name in enumerate(medians) if other in medians[name]
        ]
        widths = [found[other] for found in medians.values() if other in found]
        label = "fxshap, compiled" if other == "compiled" else other
        bars = axes.barh(positions, widths, height, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([row + height for row in range(len(medians))], list(medians))
    axes.invert_yaxis()
    axes.set_xlabel("time over that of fxshap")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def methods_for(work: Workload, chosen: dict[str, Method]) -> dict[str, Method]:
    """Return the methods that can explain a network."""
    others = () if work.stock else ("Captum", "tangermeme")
    return {name: method for name, method in chosen.items() if name not in others}


def header_row(chosen: dict[str, Method], memory: bool) -> list[str]:
    """Return the header of the table."""
    compared = [f"{name} / fxshap" for name in chosen if name not in OURS]
    header = ["network", "fxshap, ms", *compared, "SHAP / compiled", "error", "error, compiled"]
    return header + (["fxshap, MiB", "SHAP, MiB"] if memory else [])


def network_row(
    name: str, chosen: dict[str, Method], found: Times, errors: Errors, memory: bool
) -> list[str]:
    """Return the row of a network."""
    row = [
        name,
        f"{1e3 * statistics.median(found['fxshap']):.0f}",
        *(ratio(found, key) for key in chosen if key not in OURS),
        ratio(found, "SHAP", "compiled"),
        *(f"{errors[key]:.1e}" if key in errors else "-" for key in OURS),
    ]
    return row + ([f"{peak_memory(name, key):.0f}" for key in ("fxshap", "SHAP")] if memory else [])


def measure(options: argparse.Namespace) -> tuple[str, dict[str, dict[str, float]]]:
    """Time the networks; return the table, and the median ratios by network and method."""
    chosen = {"fxshap": METHODS["fxshap"]} | {name: METHODS[name] for name in options.methods}
    rows = []
    medians: dict[str, dict[str, float]] = {}
    for name in tqdm(options.networks, unit="network", file=sys.stderr):
        work = WORKLOADS[name]
        found, errors = times(work, methods_for(work, chosen), options.rounds)
        medians[name] = {
            key: statistics.median(ratios(found, key)) for key in found if key != "fxshap"
        }
        rows.append(network_row(name, chosen, found, errors, options.memory))
        tqdm.write("  ".join(rows[-1]))
    header = header_row(chosen, options.memory)
    return tabulate(rows, header, tablefmt="github", disable_numparse=True), medians


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", default=USUAL, choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="measure the peak memory too")
    parser.add_argument("--growth", action="store_true", help="measure how time grows too")
    parser.add_argument("--page", type=Path, help="the page to write into, such as docs/speed.md")
    parser.add_argument("--large", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, metavar=("NETWORK", "METHOD"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Time, print and write the table."""
    options = parse_arguments(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.child:
        child(*options.child)
        return 0
    if options.large:
        large(LARGE_CHUNK)
        return 0
    table, medians = measure(options)
    print(table)
    sentence = measure_large() if options.memory else ""
    grown = growth.measure(options.rounds) if options.growth else None
    if grown:
        print(growth.table(grown))
    if options.page:
        draw(medians)
        replace_section(options.page, "two samples", report(table, sentence, options))
    if options.page and grown:
        growth.draw(grown)
        replace_section(options.page, "growth", growth.table(grown))
    return 0


def report(table: str, sentence: str, options: argparse.Namespace) -> str:
    """Return the section of the page about two samples: what was measured, and with what."""
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "shap", "captum", "tangermeme"))
    counts = f"{SAMPLES} samples, all outputs, {options.threads} threads, {options.rounds} rounds"
    return f"""{counts} in turns in one process.
A ratio is another method's time over that of unmodified SHAP on the explainable model: the median
and, in brackets, the range. Memory is the peak of a fresh process that explains
one sample a second time, over what it held before. "SHAP's loop" is SHAP on a model that
returns zeros. "Compiled" is `make_explainable(model, compile=True)`, once it has compiled. Errors
are additivity errors in float32, relative to the largest output.

{datetime.date.today()}, Python {platform.python_version()}, {packages},
fxshap {fxshap.__version__}, `{shlex.join(["python", "-m", MODULE, *sys.argv[1:]])}`

{table}

![Times over that of fxshap](figures/speed.png)

{sentence}
"""


if __name__ == "__main__":
    sys.exit(main())
