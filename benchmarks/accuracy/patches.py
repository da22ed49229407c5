"""Coalitions of patches, for images: how near they come, and how much of a walk they leave out.

The refinement of `fxshap.runtime.coalitions` parts single pixels by chance. Neighbours that always
switch together make fewer, larger features, and a walk that switches one part of an image alone
leaves the rest of the network as it was: it could be left out. Here patches are parted in place of
pixels, on the convolutional network that `benchmarks.accuracy.refinement` trains on the digits,
with the same truth: a long run over permutations of the pixels. A walk's idle share is that of the
numbers that nonlinear operations receive which are the same at both ends of it.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor

import fxshap
from benchmarks.accuracy.refinement import Problem, digits
from fxshap.autograd.tape import Taps
from fxshap.runtime.coalitions import (
    CoalitionChains,
    CoalitionPasses,
    draw_blocks,
    refined_multipliers,
)
from tests.tools.pages import replace_section

PAGE = Path("docs/refinement.md")
SIDE = 8
PAIRS = (1, 4, 16)


def patch_scores(
    patch: int, drifting: bool, rng: np.random.Generator
) -> Iterator[NDArray[np.float64]]:
    """Draw scores of the pixels that are alike within patches, in a grid or moved by chance."""
    while True:
        count = SIDE // patch + 1
        scores = np.kron(rng.random((count, count)), np.ones((patch, patch)))
        row, column = rng.integers(0, patch, 2) if drifting else (0, 0)
        yield scores[row : row + SIDE, column : column + SIDE].ravel()


def half_planes(rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """Draw directions: a coalition is what lies on one side of a line."""
    place = np.arange(SIDE) - (SIDE - 1) / 2
    while True:
        angle = rng.random() * 2 * np.pi
        yield (np.cos(angle) * place[:, None] + np.sin(angle) * place).ravel()


SCHEMES = {
    "pixels": lambda rng: patch_scores(1, False, rng),
    "patches of 2 x 2": lambda rng: patch_scores(2, False, rng),
    "patches of 2 x 2, moved": lambda rng: patch_scores(2, True, rng),
    "patches of 4 x 4": lambda rng: patch_scores(4, False, rng),
    "patches of 4 x 4, moved": lambda rng: patch_scores(4, True, rng),
    "half planes": half_planes,
}


class Digits:
    """The trained network, walked through coalitions of its pixels."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.references = problem.references
        explainable = fxshap.make_explainable(problem.model, (self.references,))
        (self.engine,) = explainable._calls.captures.engines.values()
        self.engine.program.bind_weights(object())
        self.tape = self.engine.program.tape([self.references])
        count, outputs = len(self.references), problem.outputs
        self.grads = [unit.expand(count, -1).clone() for unit in torch.eye(outputs)]

    def differing(self, sample: Tensor) -> Tensor:
        """Return which pixels differ from each reference, of shape (references, pixels)."""
        return (sample != self.references).flatten(1)

    def explain(self, blocks: list[list[Tensor]], sample: Tensor) -> tuple[Tensor, float]:
        """Return the attributions of a sample, (pixels, outputs), and the idle share of walks."""
        end = sample.expand_as(self.references)
        idle: list[float] = []

        def walks(start: Taps, stop: Taps) -> list[list[Tensor]]:
            idle.append(
                float(np.mean([float((start[t] == stop[t]).double().mean()) for t in start]))
            )
            return self.tape.backward_many(start, stop, self.grads)

        walker = CoalitionPasses(
            lambda points: [self.engine.program.tapped(point)[1] for point in points],
            walks,
            [end],
            [self.references],
            self.engine.program.tapped([end])[1],
            self.tape.references,
        )
        found = refined_multipliers(walker, CoalitionChains(2, blocks, torch.zeros(len(end))))
        values = [(m * (end - self.references)).mean(0).flatten() for (m,) in found]
        return torch.stack(values, -1).detach(), float(np.mean(idle))

    def measure(self, scheme: str | None, pairs: int = 0) -> tuple[float, float]:
        """Return the distance to the truth and the idle share."""
        found, idle = [], []
        for sample in self.problem.samples:
            blocks: list[list[Tensor]] = []  # one pass
            if scheme:
                scores = SCHEMES[scheme](np.random.default_rng(0))
                differ = self.differing(sample)
                shape = self.references.shape
                blocks = [[draw_blocks(differ, 2, scores).reshape(shape)] for _ in range(pairs)]
            values, share = self.explain(blocks, sample)
            found.append(values.numpy())
            idle.append(share)
        return self.problem.distance(np.stack(found)), float(np.mean(idle))


def table(game: Digits) -> str:
    """Tabulate the distances over that of one pass, and the idle shares."""
    one, idle = game.measure(None)
    rows = [["one pass", *["1.00"] * len(PAIRS), f"{idle:.0%}"]]
    for scheme in SCHEMES:
        found = [game.measure(scheme, pairs) for pairs in PAIRS]
        ratios = [f"{distance / one:.2f}" for distance, _ in found]
        rows.append([scheme, *ratios, f"{found[-1][1]:.0%}"])
    header = ["coalitions of", *(f"{4 * k} walks" for k in PAIRS), "idle"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.patches", description=__doc__
    )
    parser.parse_args()
    torch.set_num_threads(1)
    text = table(Digits(digits()))
    print(text)
    command = "python -m benchmarks.accuracy.patches"
    when = f"`{command}`, {datetime.date.today()}, torch {torch.__version__}"
    replace_section(PAGE, "patches", f"{when}.\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
