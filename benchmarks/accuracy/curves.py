"""Distance to the Shapley values against time, on networks of the size that people explain.

The networks, groups and references are those of :mod:`benchmarks.accuracy.groups`. Every method
explains the same samples against the same references, for one output. The attributions of elements
are summed over the groups. The distance is sum |phi - truth| / sum |truth| over samples and groups.
Methods that capture or hook have run once before. Times are processor times on one thread, so that
other programs do not count. A method is given four times as much at each point, until a sample
would take longer than `LONGEST` seconds.

Results are stored after every point in ``build/curves``; a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxshap
from benchmarks import adapters
from benchmarks.accuracy.dasp import with_dasp
from benchmarks.accuracy.groups import Array, GroupedProblem, Truth, dna, images, text
from benchmarks.accuracy.refinement import draw_error
from benchmarks.samplers import SAMPLERS, Sampler
from tests.tools.pages import COMMIT, replace_section

PAGE = Path("docs/refinement.md")
FIGURE = Path("docs/figures/curves.png")
RESULTS = Path("build/curves")
#: Seconds that one sample may take.
LONGEST = 10.0
#: Seconds at which the methods are compared.
BUDGETS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

#: Explains one sample, of shape (1, ...): returns the values of the groups.
Explain = Callable[[Tensor], Array]
#: Prepares an explanation with so many permutations, evaluations, points or pairs of coalitions.
Prepare = Callable[[GroupedProblem, int], Explain]


@dataclass(frozen=True)
class Kind:
    """A problem, and by how many permutations its truth is estimated; by brute force if None."""

    make: Callable[[], GroupedProblem]
    permutations: int | None = None


KINDS = {
    "CNN, 16 patches": Kind(images),
    "MiniLM, 32 tokens": Kind(text, 160),
    "DNA, 200 positions": Kind(dna, 1200),
}


def from_elements(method: adapters.Method) -> Prepare:
    """Return a method that explains the elements, in one pass, whatever its setting."""

    def prepare(problem: GroupedProblem, _: int) -> Explain:
        explain = method(problem.model, [problem.references], 1)
        return lambda x: problem.by_group(explain([x]))

    return prepare


def refined(problem: GroupedProblem, pairs: int, rule: str = "rescale") -> Explain:
    """Explain with SHAP on the explainable model, with coalitions of groups."""
    refinement = fxshap.Refinement(pairs, feature_mask=problem.groups) if pairs else 0
    method = partial(adapters.with_fxshap, refine=refinement, rule=rule)
    return from_elements(method)(problem, pairs)


def exact(problem: GroupedProblem, _: int) -> Explain:
    """Explain with SHAP on the explainable model, from all coalitions of groups."""
    refinement = fxshap.Refinement("exact", feature_mask=problem.groups)
    return from_elements(partial(adapters.with_fxshap, refine=refinement))(problem, 0)


def expected_gradients(problem: GroupedProblem, points: int) -> Explain:
    """Explain with SHAP's GradientExplainer."""
    return from_elements(partial(adapters.with_expected_gradients, points=points))(problem, points)


def sampled(sampler: Sampler) -> Prepare:
    """Return a method that explains the coalition game of the groups with one of SHAP's samplers.

    Its setting is how many permutations, or how many times as many evaluations.
    """

    def prepare(problem: GroupedProblem, setting: int) -> Explain:
        def explain(x: Tensor) -> Array:
            players = problem.players(x, problem.references)
            game = problem.game(x[0], problem.references)
            zeros, ones = np.zeros((1, len(players))), np.ones((1, len(players)))
            evaluations = setting * (2 * len(players) + 1)
            return problem.of_players(sampler(game, zeros, ones, evaluations).reshape(-1), players)

        return explain

    return prepare


class OfGroups(nn.Module):
    """A network as a function of how present each group is, from 0 to 1."""

    def __init__(self, problem: GroupedProblem, sample: Tensor, reference: Tensor) -> None:
        super().__init__()
        self.model, self.shape = problem.model, sample.shape
        self.register_buffer("elements", torch.from_numpy(problem.elements))
        self.register_buffer("reference", reference.flatten())
        self.register_buffer("change", (sample - reference).flatten())

    def forward(self, z: Tensor) -> Tensor:
        """Map rows of the shape (rows, groups)."""
        x = z[:, self.elements] * self.change + self.reference
        return self.model(x.reshape(-1, *self.shape))


def dasp(problem: GroupedProblem, sizes: int) -> Explain:
    """Explain with DASP, with the groups as features."""
    zeros, ones = (f(1, int(problem.elements.max()) + 1) for f in (torch.zeros, torch.ones))
    captured = [
        [
            with_dasp(OfGroups(problem, x, r).eval(), [zeros], 1, sizes=sizes)
            for r in problem.references
        ]
        for x in problem.samples
    ]

    def explain(x: Tensor) -> Array:
        number = int((problem.samples == x).flatten(1).all(1).nonzero()[0, 0])
        found = [explain_groups([ones]).reshape(-1).numpy() for explain_groups in captured[number]]
        return np.asarray(np.mean(found, 0))

    return explain


def powers(first: int, last: int) -> list[int]:
    """Return first, four times that, ... up to last."""
    return [first << k for k in range(0, (last // first).bit_length(), 2)]


#: Every method and how much of it to take, one point of its curve after another.
METHODS: dict[str, tuple[Prepare, list[int]]] = {
    "fxshap, refine": (refined, [0, *powers(1, 1024)]),
    "fxshap, variances": (partial(refined, rule="variance"), [0, *powers(1, 1024)]),
    "fxshap, exact": (exact, [0]),
    **{name: (sampled(sampler), powers(1, 4096)) for name, sampler in SAMPLERS.items()},
    "expected gradients": (expected_gradients, powers(16, 65536)),
    "DASP": (dasp, [1, 4, 16]),
    "integrated gradients": (from_elements(adapters.with_integrated_gradients), [64]),
    "SHAP, one pass": (from_elements(adapters.with_shap), [0]),
    "Captum, one pass": (from_elements(adapters.with_captum), [0]),
    "tangermeme, one pass": (from_elements(adapters.with_tangermeme), [0]),
}


@dataclass(frozen=True)
class Point:
    """One point of a curve, or why there is none."""

    problem: str
    method: str
    setting: int
    seconds: float = 0.0
    distance: float = 0.0
    reason: str = ""
    commit: str = COMMIT


class Store:
    """The results of a run, on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "points.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.points = [Point(**json.loads(line)) for line in lines]

    def add(self, point: Point) -> None:
        """Store one more point."""
        self.points.append(point)
        with self.file.open("a") as file:
            file.write(json.dumps(asdict(point)) + "\n")

    def curve(self, problem: str, method: str) -> list[Point]:
        """Return the points of one curve, without failures."""
        return [p for p in self.points if (p.problem, p.method) == (problem, method)]

    def truth(self, problem: str, compute: Callable[[], Truth]) -> Truth:
        """Return the stored truth of a problem, or compute and store it."""
        file = self.folder / f"{problem.split(',')[0]}.npz"
        if not file.exists():
            truth = compute()
            np.savez(file, values=truth.values, error=truth.error)
        with np.load(file) as stored:
            return Truth(stored["values"], float(stored["error"]))


class Measured:
    """One problem, made when it is first needed."""

    def __init__(self, name: str, kind: Kind, store: Store) -> None:
        self.name, self.kind, self.store = name, kind, store

    @cached_property
    def problem(self) -> GroupedProblem:
        """The network and its samples."""
        return self.kind.make()

    @cached_property
    def truth(self) -> Truth:
        """The values that the methods are compared with."""
        return self.store.truth(self.name, lambda: self.problem.truth(self.kind.permutations))

    def measure(self, method: str) -> None:
        """Add the missing points of one curve."""
        prepare, settings = METHODS[method]
        done = {point.setting: point for point in self.store.curve(self.name, method)}
        for number, setting in enumerate(settings):
            point = done.get(setting) or self.point(method, prepare, setting)
            if setting not in done:
                self.store.add(point)
                print(f"  {method}, {setting}: {describe(point)}", flush=True)
            growth = settings[number + 1] / max(setting, 1) if setting != settings[-1] else 1
            if point.reason or growth * point.seconds > LONGEST:
                return

    def point(self, method: str, prepare: Prepare, setting: int) -> Point:
        """Measure one point."""
        if method == "fxshap, exact" and len(np.unique(self.problem.elements)) > 16:
            return Point(self.name, method, setting, reason="more than 16 features")
        problem = copy.copy(self.problem)
        problem.model = copy.deepcopy(problem.model)  # some methods leave hooks behind
        try:
            np.random.seed(0)
            torch.manual_seed(0)
            explain = prepare(problem, setting)
            if method not in ("fxshap, exact", "DASP"):
                explain(problem.samples[:1])  # what is captured or compiled once
            start = time.process_time()
            values = np.stack([explain(sample) for sample in problem.samples.split(1)])
            seconds = (time.process_time() - start) / len(values)
        except Exception as error:  # any failure of a method is a result
            line = (str(error).splitlines() or [""])[0][:160]
            return Point(self.name, method, setting, reason=f"{type(error).__name__}: {line}")
        return Point(self.name, method, setting, seconds, self.truth.distance(values))


def describe(point: Point) -> str:
    """Return a point in words."""
    return point.reason or f"{point.distance:.4f} in {point.seconds:.3f} s"


def within(curve: Sequence[Point], budget: float) -> Point | None:
    """Return the latest point of a curve within a time."""
    return next((p for p in reversed(curve) if p.seconds <= budget and not p.reason), None)


def table(store: Store) -> str:
    """Tabulate the distance of every method within the same times."""
    rows = []
    for problem in KINDS:
        curves = {method: store.curve(problem, method) for method in METHODS}
        shown = {m: c for m, c in curves.items() if any(not p.reason for p in c)}
        cells = {m: [within(curve, budget) for budget in BUDGETS] for m, curve in shown.items()}
        best = [
            min((row[i].distance for row in cells.values() if row[i]), default=-1.0)
            for i in range(len(BUDGETS))
        ]
        for number, (method, row) in enumerate(cells.items()):
            printed = [
                "-" if p is None else f"**{p.distance:.3f}**" if p.distance == b else
                f"{p.distance:.3f}"
                for p, b in zip(row, best, strict=True)
            ]  # fmt: skip
            rows.append([problem if number == 0 else "", method, *printed])
    header = ["", "method", *(f"{b:g} s" for b in BUDGETS)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def reasons(store: Store) -> list[str]:
    """List the methods that gave no values, and why."""
    return [f"- {p.method}, {p.problem}: `{p.reason}`" for p in store.points if p.reason]


def draw(store: Store, errors: dict[str, float]) -> None:
    """Draw the curves of every problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 5.6), layout="constrained", sharey=True)
    colors = [f"C{k}" for k in range(10)] + ["black", "0.6"]
    for panel, problem in zip(axes, KINDS, strict=True):
        for number, method in enumerate(METHODS):
            curve = [p for p in store.curve(problem, method) if not p.reason]
            if not curve:
                continue
            ours = method.startswith("fxshap")
            panel.plot(
                [p.seconds for p in curve], [max(p.distance, 1e-4) for p in curve],
                marker="o*Xs^vDPdph<"[number], color=colors[number], label=method,
                markersize=5 if len(curve) > 1 else 9, linewidth=2.4 if ours else 1.2,
                zorder=3 if ours else 2,
            )  # fmt: skip
        if errors[problem]:
            draw_error(panel, errors[problem])
        panel.set(xscale="log", yscale="log", ylim=(6e-5, 10), title=problem)
        panel.set(xlabel="seconds a sample")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("distance to the Shapley values")
    handles = {
        label: h
        for panel in axes
        for h, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=120)
    plt.close(figure)


def main() -> int:
    """Measure what is missing, draw and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.curves", description=__doc__
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--only", choices=KINDS, nargs="+", help="measure these, write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = Store(options.results)
    errors = {}
    for name in options.only or KINDS:
        measured = Measured(name, KINDS[name], store)
        errors[name] = measured.truth.error
        print(f"{name}: truth to {errors[name]:.4f}", flush=True)
        for method in METHODS:
            measured.measure(method)
    if options.only:
        return 0
    draw(store, errors)
    packages = ("torch", "shap", "captum", "tangermeme", "transformers")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    when = f"`python -m benchmarks.accuracy.curves`, {datetime.date.today()}, "
    when += f"Python {platform.python_version()}, {versions}, fxshap {fxshap.__version__}."
    chart = "![Distance against time on larger networks](figures/curves.png)"
    truth = "The expected distance of the truth itself to the exact values: "
    truth += ", ".join(f"{error:.3f} ({name})" for name, error in errors.items() if error) + "."
    found = table(store)
    print(found, *reasons(store), truth, sep="\n")
    commits = ", ".join(f"commit {c}" for c in dict.fromkeys(p.commit for p in store.points))
    parts = [when, chart, found, truth, "\n".join(reasons(store)), f"Measured on {commits}."]
    replace_section(PAGE, "curves", "\n\n".join(filter(None, parts)), stamp=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
