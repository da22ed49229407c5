"""How near refinement comes to the exact values, and other schemes at the same cost.

Every network of `tests.networks` has ten features; a few samples are compared with 16
references each, and the mean over the references with the exact Shapley values by brute force:

    sum |phi - exact| / sum |exact|

over samples, features and outputs, in float64. A scheme draws the blocks of features that the
chains of `fxshap.runtime.coalitions` switch; the backward passes are the library's own.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import fxshap
from benchmarks.adapters import join, split
from benchmarks.programs import bound_program, coalition_passes
from fxshap.runtime.coalitions import (
    CoalitionChains,
    balanced_scores,
    draw_blocks,
    draw_chains,
    refined_multipliers,
    share_together,
)
from fxshap.runtime.refinement import Refinement
from fxshap.runtime.shapley import coalitions, shapley_weights
from tests.networks import NETWORKS, Network
from tests.tools.pages import replace_section

PAGE = Path("docs/refinement.md")
REFERENCES = 16
PAIRS = (0, 1, 2, 4, 8, 16)
#: The bars of the library: the median over that of one pass, and the farthest network.
MEDIAN, FARTHEST = 0.55, 1.05

Random = np.random.Generator
#: The scores of the features for one reference after another.
Scores = Callable[[int, Random], "list[NDArray[np.float64]]"]
Scheme = Callable[[int], CoalitionChains]
#: For every network and scheme the distance.
Results = dict[str, dict[str, float]]


class Game:
    """One network, its pairs of a sample and a reference, and their exact Shapley values.

    Parameters
    ----------
    network : Network
    samples : int
    """

    def __init__(self, network: Network, samples: int) -> None:
        self.network, self.samples = network, samples
        self.model = network.build().double()
        x = network.inputs(samples, seed=1, dtype=torch.float64)
        r = network.inputs(REFERENCES, seed=2, dtype=torch.float64)
        self.x, self.r = join(x).repeat_interleave(REFERENCES, 0), join(r).repeat(samples, 1)
        points = split(self.r, network.shapes)
        self.programs = {kind: bound_program(self.model, points, kind) for kind in (False, True)}
        every = coalitions(network.features)
        weights = shapley_weights(every)
        with torch.no_grad():
            values = [
                weights @ self.model(*split(torch.where(every, a, b), network.shapes))
                for a, b in zip(self.x, self.r, strict=True)
            ]
        self.exact = self.mean(torch.stack(values))

    def mean(self, values: Tensor) -> Tensor:
        """Average over the references."""
        return values.unflatten(0, (self.samples, REFERENCES)).mean(1)

    def distance(self, chains: CoalitionChains, variances: bool = False) -> float:
        """Return the distance of what the chains give to the exact values."""
        shapes, count = self.network.shapes, max(len(chains.drawn), 1)
        x, r = self.x.repeat(count, 1), self.r.repeat(count, 1)  # all chains in one batch
        units = torch.eye(self.network.outputs, dtype=torch.float64)
        passes = coalition_passes(
            self.programs[variances],
            list(split(x, shapes)),
            list(split(r, shapes)),
            [unit.repeat(len(x), 1) for unit in units],
        )
        drawn = [join(tuple(chain)).repeat(self.samples, 1) for chain in chains.drawn]
        batch = [list(split(torch.cat(drawn), shapes))] if drawn else []
        weight = None if chains.weight is None else chains.weight.repeat(self.samples * count)
        repeated = CoalitionChains(chains.blocks, batch, weight)
        multipliers = refined_multipliers(passes, repeated)
        values = torch.stack([join(tuple(m)) * (x - r) for m in multipliers], -1)
        mean = self.mean(values.unflatten(0, (count, -1)).mean(0))
        return float((mean - self.exact).abs().sum() / self.exact.abs().sum())


def library(pairs: int, features: int = 10) -> CoalitionChains:
    """Draw what ``make_explainable(model, refine=pairs)`` draws for 16 references."""
    sample, references = torch.ones(1, features), torch.zeros(REFERENCES, features)
    return draw_chains(Refinement(pairs), [sample], [references])


def independent(features: int, rng: Random) -> list[NDArray[np.float64]]:
    """Draw a random order of the features."""
    return [rng.random(features)]


def latin(features: int, rng: Random) -> list[NDArray[np.float64]]:
    """Draw orders in which every feature takes every position once."""
    order = rng.permutation(features)
    return [(order + shift) % features + 0.0 for shift in rng.permutation(features)]


def orthogonal(features: int, rng: Random) -> list[NDArray[np.float64]]:
    """Draw orders from orthogonal directions (Mitchell et al. 2022)."""
    directions = rng.standard_normal((features, features - 1))
    return list(np.linalg.qr(directions - directions.mean(0))[0].T)


def chains(
    pairs: int,
    blocks: int,
    draw: Scores | None = None,
    trust: float = 0.0,
    uneven: bool = False,
    features: int = 10,
) -> CoalitionChains:
    """Draw chains for 16 references by another scheme.

    Parameters
    ----------
    pairs : int
        Four backward passes each.
    blocks : int
    draw : callable, optional
        Draws some orders of the features; by default balanced ones.
    trust : float
        How far to extrapolate from one pass; 1 removes all the error that
        one and two blocks share.
    uneven : bool
        Whether the first of two blocks has a random size.
    features : int
    """
    rng = np.random.default_rng(0)

    def scores() -> object:
        while draw:
            yield from draw(features, rng)

    rows = scores() if draw else balanced_scores(features, blocks, rng)
    differ = torch.ones(REFERENCES, features, dtype=torch.bool)
    drawn = [draw_blocks(differ, blocks, rows) for _ in range(2 * pairs // blocks)]  # type: ignore[arg-type]
    if uneven:
        drawn = [uneven_halves(rng, features) for _ in drawn]
    together = share_together(differ.sum(1), blocks)
    weight = trust * together / (1 - together) if trust else None
    return CoalitionChains(blocks, [[block] for block in drawn], weight)


def uneven_halves(rng: Random, features: int) -> Tensor:
    """Draw coalitions of random size, and their complements."""
    rank = rng.random((REFERENCES, features)).argsort(1).argsort(1)
    return torch.from_numpy((rank >= rng.integers(1, features, (REFERENCES, 1))).astype(np.uint8))


#: What the library does.
LIBRARY: dict[str, Scheme] = {f"refine={k}": lambda _, k=k: library(k) for k in PAIRS}  # type: ignore[misc]
#: Before the names of the same with variances.
WITH = "variances, "
#: What was tried at the cost of so many pairs.
TRIED: dict[str, Scheme] = {
    "random halves": lambda k: chains(k, 2, independent),
    "halves of any size": lambda k: chains(k, 2, independent, uneven=True),
    "halves, Latin orders": lambda k: chains(k, 2, latin),
    "halves, orthogonal orders": lambda k: chains(k, 2, orthogonal),
    "halves, balanced": lambda k: chains(k, 2),
    "4 blocks, orthogonal": lambda k: chains(k, 4, orthogonal),
    "4 blocks, balanced": lambda k: chains(k, 4),
    "8 blocks, balanced": lambda k: chains(k, 8),
    "halves, balanced, trust 0.5": lambda k: chains(k, 2, trust=0.5),
    "halves, balanced, trust 1": lambda k: chains(k, 2, trust=1.0),
    "4 blocks, balanced, trust 0.5": lambda k: chains(k, 4, trust=0.5),
}
LEAST_PAIRS = {"4": 2, "8": 4}


def measure(network: Network, samples: int, pairs: list[int]) -> dict[str, float]:
    """Return the distance of every scheme on one network."""
    game = Game(network, samples)
    found = {name: game.distance(scheme(0)) for name, scheme in LIBRARY.items()}
    found |= {WITH + name: game.distance(scheme(0), True) for name, scheme in LIBRARY.items()}
    for name, scheme in TRIED.items():
        for k in pairs:
            if k >= LEAST_PAIRS.get(name[0], 1):
                found[f"{name}, k={k}"] = game.distance(scheme(k))
    return found


def ratios(results: Results, scheme: str) -> dict[str, float]:
    """Return the distance over that of one pass, by network."""
    one = f"refine={PAIRS[0]}"
    return {name: row[scheme] / row[one] for name, row in results.items() if row[one] > 1e-9}


def line(results: Results, scheme: str) -> list[str]:
    """Return the cells of one scheme."""
    each = ratios(results, scheme)
    farthest = max(each, key=lambda name: each[name])
    return [
        f"{statistics.median(row[scheme] for row in results.values()):.4f}",
        f"{statistics.median(each.values()):.2f}",
        f"{statistics.quantiles(each.values(), n=10)[-1]:.2f}",
        f"{each[farthest]:.2f} ({farthest})",
    ]


def library_table(results: Results) -> str:
    """Tabulate what the library does."""
    header = ["", "passes", "median distance", "median ratio", "9 of 10 below", "farthest"]
    rows = [
        [before + f"`{scheme}`", library(k).backward_passes, *line(results, before + scheme)]
        for before in ("", WITH)
        for k, scheme in zip(PAIRS, LIBRARY, strict=True)
    ]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def tried_table(results: Results, pairs: list[int]) -> str:
    """Tabulate the median ratio of every scheme at the cost of so many pairs, and the worst."""
    rows = []
    for name in TRIED:
        row = [name]
        for k in pairs:
            scheme = f"{name}, k={k}"
            if all(scheme in found for found in results.values()):
                each = ratios(results, scheme).values()
                row.append(f"{statistics.median(each):.2f} ({max(each):.2f})")
            else:
                row.append("-")
        rows.append(row)
    header = ["scheme", *(f"{4 * k} passes" for k in pairs)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def judge(results: Results) -> list[str]:
    """Return the verdicts: how the library compares with its bars."""
    medians = [statistics.median(row[scheme] for row in results.values()) for scheme in LIBRARY]
    worst = {scheme: max(ratios(results, scheme).values()) for scheme in list(LIBRARY)[1:]}
    falls = all(b < a for a, b in zip(medians, medians[1:], strict=False))
    farthest = max(worst, key=lambda scheme: worst[scheme])
    said = [
        (
            medians[1] <= MEDIAN * medians[0],
            f"the median distance of `refine=1` is {medians[1] / medians[0]:.2f} of that of one "
            f"pass (at most {MEDIAN})",
        ),
        (
            worst[farthest] <= FARTHEST,
            f"no network is farther than {FARTHEST} of one pass at any k (the farthest: "
            f"{worst[farthest]:.2f}, with `{farthest}`)",
        ),
        (falls, f"the median falls over k = {', '.join(map(str, PAIRS))}"),
    ]
    return [f"- {'PASS' if passed else 'FAIL'}: {sentence}" for passed, sentence in said]


def main() -> int:
    """Measure, print, and write into the page if all networks were measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.coalitions", description=__doc__
    )
    parser.add_argument("--networks", default="*", metavar="PATTERN", help="names, as in a shell")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tried", type=int, nargs="*", default=[1, 4, 16], help="pairs tried")
    parser.add_argument("--results", type=Path, help="results of a stopped run, to continue")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the networks are too small for more
    names = fnmatch.filter(NETWORKS, options.networks)
    stored = options.results
    lines = stored.read_text().splitlines() if stored and stored.exists() else []
    results: Results = dict(map(json.loads, lines))
    for name in tqdm([name for name in names if name not in results], unit="network"):
        try:
            results[name] = measure(NETWORKS[name], options.samples, options.tried)
        except RuntimeError as error:  # a network that fixes its number of rows
            tqdm.write(f"{name}: {str(error).splitlines()[0][:120]}")
            continue
        if stored:
            with stored.open("a") as file:
                file.write(json.dumps([name, results[name]]) + "\n")
    tables = library_table(results), tried_table(results, options.tried)
    said = judge(results)
    print(*tables, *said, sep="\n")
    if len(names) == len(NETWORKS):
        command = "python -m benchmarks.accuracy.coalitions"
        versions = f"torch {torch.__version__}, fxshap {fxshap.__version__}"
        when = f"`{command}`, {datetime.date.today()}, {versions}: {len(results)} networks."
        text = [when, tables[0], "\n".join(said)]
        replace_section(PAGE, "coalitions", "\n\n".join(text))
        replace_section(PAGE, "tried", tables[1])
    return int(any("FAIL" in verdict for verdict in said))


if __name__ == "__main__":
    sys.exit(main())
