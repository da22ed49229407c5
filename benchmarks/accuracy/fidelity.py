"""How far each attribution method is from the exact Shapley values.

For every network of `tests.networks`, every model of a report with at most ten features, and a few
pairs of a sample and a reference, the exact Shapley values are computed by brute force. A method's
distance is

    sum |phi - exact| / sum |exact|

over the pairs, the features and the outputs, in float64. A method adds up if its attributions
sum to the difference of the outputs, to 1e-5 of the outputs.

Every measurement is stored in ``build/fidelity``. A run that was stopped goes on there, if the
commit is the same, and several runs with other networks share what they measure.
"""

import argparse
import dataclasses
import datetime
import fnmatch
import json
import math
import platform
import shlex
import statistics
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

import fxshap
from benchmarks.accuracy.measurement import (
    ADDS_UP,
    EVALUATIONS,
    FXSHAP,
    GRADIENTS,
    METHODS,
    VARIANCES,
    Measurement,
    Results,
    measure,
)
from tests.networks import NETWORKS, Network
from tests.networks.reports import REPORTS
from tests.tools.pages import COMMIT, read_section

OUTPUT = Path("docs/fidelity.md")
STORED = Path("build/fidelity")
NO_FARTHER = 1.05
MEDIAN_RATIO = 0.4
TRAINED = "trained"
"""The section of the page with the trained networks."""
MAX_FEATURES = 10
"""Models of reports with more features are left out: brute force doubles with each."""
ROUNDING = 1e-9
"""Distances below this differ only by rounding."""
EXACT = 1e-6
"""A method whose distance is below this on all networks has no column for each."""
COMPETITORS = ("SHAP", "Captum", "tangermeme")

SMALL_REPORTS = {n: report for n, report in REPORTS.items() if report.features <= MAX_FEATURES}
"""The models of reports that are measured."""


def stored_results(file: Path) -> Results:
    """Read what runs of the same commit have measured."""
    results: Results = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        name, row = json.loads(line)
        measured = {method: Measurement(**values) for method, values in row.items()}
        results[name] = results.get(name, {}) | measured
    return results


def measure_all(
    networks: dict[str, Network], names: list[str], methods: list[str], count: int
) -> Results:
    """Measure every network, except for what is stored."""
    file = STORED / f"{COMMIT}-{count}.jsonl"
    stored = stored_results(file) if not COMMIT.endswith("+") else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    results: Results = {}
    for name in tqdm(names, unit="network"):
        row = stored.get(name, {})
        if missing := [method for method in methods if method not in row]:
            found = measure(networks[name], missing, count)
            row = row | found
            values = {method: dataclasses.asdict(each) for method, each in found.items()}
            with file.open("a") as lines:
                lines.write(json.dumps([name, values]) + "\n")
        results[name] = {method: row[method] for method in methods}
    return results


@dataclass(frozen=True)
class Verdict:
    """A sentence about the results, whether it is good enough, and the networks where not."""

    sentence: str
    passed: bool
    failing: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the sentence with its outcome."""
        where = f": not on {', '.join(self.failing)}" if self.failing else ""
        return f"{'PASS' if self.passed else 'FAIL'}: {self.sentence}{where}"


def median(results: Results, method: str) -> float:
    """Return the median distance over the networks where the method gives values."""
    distances = [row[method].distance for row in results.values() if not row[method].reason]
    return statistics.median(distances) if distances else math.nan


def judge_distance(results: Results) -> Verdict:
    """Judge whether fxshap is nowhere farther than the best competitor."""
    failing = []
    for name, row in results.items():
        distances = [row[method].distance for method in COMPETITORS if method in row]
        best = min((d for d in distances if math.isfinite(d)), default=math.inf)
        if not row[FXSHAP].distance <= NO_FARTHER * best + ROUNDING:
            failing.append(name)
    return Verdict(
        f"fxshap is at most {NO_FARTHER - 1:.0%} farther than the best of "
        f"{', '.join(COMPETITORS)} on {len(results) - len(failing)} of {len(results)} networks",
        not failing,
        tuple(failing),
    )


def judge_median(results: Results) -> Verdict:
    """Judge fxshap's median distance against that of integrated gradients, on the same networks."""
    both = {
        name: row
        for name, row in results.items()
        if not row[FXSHAP].reason and not row[GRADIENTS].reason
    }
    ratio = median(both, FXSHAP) / median(both, GRADIENTS)
    return Verdict(
        f"fxshap's median distance is {ratio:.2f} of that of {GRADIENTS} (at most {MEDIAN_RATIO})",
        ratio <= MEDIAN_RATIO,
    )


def compare_variances(results: Results) -> str:
    """Return on how many networks variances change something, and how much nearer they come."""
    ratios = {
        name: row[VARIANCES].distance / row[FXSHAP].distance
        for name, row in results.items()
        if row[FXSHAP].distance > ROUNDING
    }
    changed = {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > 1e-3}
    nearer, middle = sum(r < 1 for r in changed.values()), statistics.median(changed.values())
    farthest = max(changed, key=lambda name: changed[name])
    return (
        f"Variances change {len(changed)} networks: {nearer} are nearer, the median is "
        f"{middle:.2f} of the distance of one pass "
        f"and the farthest {changed[farthest]:.2f} ({farthest})."
    )


def judge(results: Results, methods: list[str]) -> list[Verdict]:
    """Pass the verdicts that the methods allow."""
    verdicts = []
    if FXSHAP in methods and set(COMPETITORS) <= set(methods):
        verdicts.append(judge_distance(results))
    if FXSHAP in methods and GRADIENTS in methods:
        verdicts.append(judge_median(results))
    return verdicts


def network_table(results: Results, methods: list[str], style: str) -> str:
    """Tabulate the distance of every method on every network, without methods that are exact."""
    methods = [m for m in methods if any(not row[m].distance < EXACT for row in results.values())]

    def cell(measurement: Measurement) -> str:
        if measurement.reason:
            return "-"
        mark = "" if measurement.adds_up else "\u00a0!"  # a line does not break there
        return f"{measurement.distance:.4f}{mark}"

    rows = [[name, *(cell(row[method]) for method in methods)] for name, row in results.items()]
    return tabulate(rows, headers=["network", *methods], tablefmt=style, disable_numparse=True)


def summary_table(results: Results, methods: list[str], style: str) -> str:
    """Tabulate the median distance and the counts of networks of every method."""
    rows = []
    for method in methods:
        measurements = [row[method] for row in results.values()]
        answered = sum(not measurement.reason for measurement in measurements)
        exact = sum(measurement.adds_up for measurement in measurements)
        times = [m.seconds for m in measurements if m.seconds == m.seconds]
        row = [method, f"{median(results, method):.4f}", exact, answered, len(results)]
        rows.append([*row, *([f"{1000 * statistics.median(times):.1f}"] if times else [])])
    headers = ["method", "median distance", "adds up on", "gives values on", "networks"]
    if any(m.seconds == m.seconds for row in results.values() for m in row.values()):
        headers.append("median ms a pair")
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)


def reasons(results: Results) -> list[str]:
    """List why methods gave no values, the networks with the same reason together."""
    networks: dict[tuple[str, str], list[str]] = {}
    for name, row in results.items():
        for method, measurement in row.items():
            if measurement.reason:
                networks.setdefault((method, measurement.reason), []).append(name)
    return [
        f"- {method}, {', '.join(names)}: `{reason}`"
        for (method, reason), names in sorted(networks.items())
    ]


def page(
    results: Results,
    of_reports: Results,
    methods: list[str],
    verdicts: list[Verdict],
    command: str,
    trained: str = "",
) -> str:
    """Write the results as Markdown.

    Parameters
    ----------
    results : dict
        The measurements of each network.
    of_reports : dict
        The measurements of each model of a report.
    methods : list of str
        The methods that were measured.
    verdicts : list of Verdict
        What was judged of them.
    command : str
        The command that measured them.
    trained : str
        The section that `benchmarks.accuracy.trained` writes.

    Returns
    -------
    str
        A Markdown page.
    """
    packages = ("torch", "shap", "captum", "tangermeme")
    versions = [f"{package} {version(package)}" for package in packages]
    versions += [f"fxshap {fxshap.__version__}", f"Python {platform.python_version()}"]
    sections = [
        "# Distance to the exact Shapley values",
        f"<!-- networks -->\n`{command}`, {datetime.date.today()}, with {', '.join(versions)}, "
        f"commit {COMMIT}.",
        "The distance is sum |phi - exact| / sum |exact| in float64, where the exact Shapley "
        "values are computed by brute force over the 1024 coalitions of ten features against one "
        "reference. `!` marks attributions that do not sum to the difference of the outputs to "
        f"{ADDS_UP:g} of the outputs; `-` marks a method that gave no values. "
        f"SHAP's sampling explainers evaluate {EVALUATIONS} rows for a pair. "
        "A median is over the networks where the method gave values.",
        summary_table(results, methods, "github"),
        *(f"- {verdict}" for verdict in verdicts),
        *([compare_variances(results)] if {FXSHAP, VARIANCES} <= {*methods} else []),
        "On a network of one hidden layer the rescale rule and integrated gradients are the same "
        "formula: the path integral of f' along a straight line is its secant. One pass and "
        "integrated gradients therefore differ only where layers meet, and where fxshap has the "
        "rule of the operation itself (norms, maxima, softmax, comparisons, products)."
        "\n<!-- end -->",
        "## Trained networks",
        "Random weights are more nonlinear than the networks that people explain. These networks "
        "of 8 to 12 features were trained on tables, digits, series and text; samples are rows "
        "that were not trained on, and references are training rows.",
        f"<!-- {TRAINED} -->\n{trained}<!-- end -->",
        "## By network",
        network_table(results, methods, "github"),
    ]
    if of_reports:
        sources = [f"{name}: {REPORTS[name].source}" for name in of_reports]
        sections += [
            "## Models that users reported",
            f"Models with at most {MAX_FEATURES} features, rebuilt small from public reports, and "
            "habits that many share.",
            summary_table(of_reports, methods, "github"),
            network_table(of_reports, methods, "github"),
            f"Sources: {'; '.join(sources)}.",
        ]
    if why := reasons({**results, **of_reports}):
        sections += ["## Why there are no values", "\n".join(why)]
    return "\n\n".join(sections) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.fidelity", description=__doc__
    )
    parser.add_argument("--networks", default="*", metavar="PATTERN", help="names, as in a shell")
    parser.add_argument("--samples", type=int, default=16, help="pairs for each network")
    parser.add_argument(
        "--only-methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD"
    )
    parser.add_argument(
        "--output", type=Path, help=f"Markdown file; {OUTPUT} if all is measured, else none"
    )
    return parser.parse_args()


def main() -> int:
    """Measure, print and write; return 1 if a verdict fails."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the networks are too small for more
    methods = arguments.only_methods
    networks: dict[str, Network] = {**NETWORKS, **SMALL_REPORTS}
    names = fnmatch.filter(networks, arguments.networks)
    if not names:
        sys.exit(f"no network matches {arguments.networks!r}")
    measured = measure_all(networks, names, methods, arguments.samples)
    results = {name: row for name, row in measured.items() if name in NETWORKS}
    of_reports = {name: row for name, row in measured.items() if name in SMALL_REPORTS}
    verdicts = judge(results, methods) if results else []
    for rows in filter(None, (results, of_reports)):
        print(network_table(rows, methods, "simple"), end="\n\n")
        print(summary_table(rows, methods, "simple"), end="\n\n")
    print(*reasons(measured), *verdicts, sep="\n")
    whole = len(names) == len(networks) and len(methods) == len(METHODS)
    output = arguments.output or (OUTPUT if whole else None)
    if output:
        command = shlex.join(["python", "-m", "benchmarks.accuracy.fidelity", *sys.argv[1:]])
        output.parent.mkdir(parents=True, exist_ok=True)
        trained = read_section(output, TRAINED) if output.exists() else ""
        output.write_text(page(results, of_reports, methods, verdicts, command, trained))
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
