"""How many samples a second the explainer explains on a CPU, compared with other methods.

SHAP on the original model and on the explainable one, Captum and tangermeme explain the same
samples in the same process, in turns; Captum and tangermeme at the batch size that is fastest.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import statistics
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.performance import methods as m
from benchmarks.performance import rates
from benchmarks.performance.results import Results, Row, markdown
from benchmarks.performance.workloads import WORKLOADS
from tests.tools.pages import replace_section

MODULE = "benchmarks.performance.explainer"
COMPILED_EXPLAINER = "explainer, compiled"
#: Compiled explainers are timed on this network.
COMPILED_NETWORKS = ("transformer",)
OTHERS = (m.STOCK, m.OURS, "Captum", "tangermeme")


def chosen_methods(network: str) -> dict[str, m.Method]:
    """Return the methods that explain a network."""
    names = [*OTHERS, m.EXPLAINER] if WORKLOADS[network].stock else [m.STOCK, m.OURS, m.EXPLAINER]
    chosen = {name: m.METHODS[name] for name in names}
    if network in COMPILED_NETWORKS:
        chosen[COMPILED_EXPLAINER] = m.explainer(compile=True)
    return chosen


def measure(options: argparse.Namespace) -> list[Row]:
    """Time all networks and return a row for each method."""
    settings = rates.Settings(
        torch.device("cpu"), options.samples, options.turn, options.rounds, large=True
    )
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder))
        for network in tqdm(options.networks, unit="network", file=sys.stderr):
            rates.guarded(results, network, settings, chosen_methods(network), options.seconds)
        return results.rows()


def table(rows: list[Row]) -> str:
    """Return the rate of the explainer on each network, and how many times that of the others."""
    header = ["network", "method", "samples/s", *[f"over {name}" for name in OTHERS], "error"]
    body = []
    for network in dict.fromkeys(row["network"] for row in rows if "network" in row):
        timed = {row["method"]: row for row in rows if row.get("network") == network}
        for name in (m.EXPLAINER, COMPILED_EXPLAINER):
            row = timed.get(name)
            if row is None or "error" in row:
                continue
            ratios = [ratio(row, timed.get(other)) for other in OTHERS]
            each = [f"{row['per_second']:.4g}", *ratios, f"{row['additivity']:.1e}"]
            body.append([network, name, *each])
    return markdown(header, body)


def ratio(row: Row, other: Row | None) -> str:
    """Return the median and the range of the rate of a method over that of another."""
    if other is None or "error" in other:
        return "-"
    pairs = zip(row["seconds"], other["seconds"], strict=True)
    each = [(b / other["samples"]) / (a / row["samples"]) for a, b in pairs]
    return f"{statistics.median(each):.1f} ({min(each):.1f}-{max(each):.1f})"


def failures(rows: list[Row]) -> str:
    """Return what could not be timed, line by line."""
    lines = [f"- {r['network']}, {r['method']}: {r['error']}" for r in rows if "error" in r]
    return "\n".join(lines + [f"- {r['text']}" for r in rows if r["part"] == "note"])


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--turn", type=float, default=4, help="seconds of a method in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600, help="the most for one network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", type=Path, help="the page to write into, such as docs/speed.md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Time, print and write the table."""
    options = parse_arguments(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    rows = measure(options)
    text = f"{table(rows)}\n\n{failures(rows)}".strip()
    print(text)
    if options.page:
        packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "shap", "captum", "tangermeme"))
        command = shlex.join(["python", "-m", MODULE, *sys.argv[1:]])
        counts = f"{options.samples} samples, all outputs, {options.threads} threads."
        about = f"""{counts} A ratio is the
rate of the explainer over that of another method: the median of {options.rounds} rounds and, in
brackets, the range. A method that would take longer than {options.turn:g} s explains the first
samples, and its rate counts as that of all.

{datetime.date.today()}, Python {platform.python_version()}, {packages}, `{command}`"""
        replace_section(options.page, "explainer", f"{about}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
