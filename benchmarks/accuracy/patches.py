"""Coalitions of patches, for images: how near they come, and how much of a pass is idle.

The refinement of `fxshap.runtime.coalitions` divides single pixels at random. Neighbours that
always switch together make fewer, larger features. A backward pass that switches only one part of
an image leaves the rest of the network as it was, and could leave it out. Here patches are divided
instead of pixels, on the convolutional network that `benchmarks.accuracy.problems` trains on the
digits, with the same truth: a long run over permutations of the pixels. The idle share of a pass
is the share of the numbers that nonlinear operations receive which are equal at both endpoints.
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

from benchmarks.accuracy.problems import Problem, digits
from benchmarks.programs import bound_program, coalition_passes
from fxshap.autograd.tape import Taps
from fxshap.runtime.coalitions import (
    CoalitionChains,
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
    """Draw scores of the pixels that are alike within patches, in a grid or at random offsets."""
    while True:
        count = SIDE // patch + 1
        scores = np.kron(rng.random((count, count)), np.ones((patch, patch)))
        row, column = rng.integers(0, patch, 2) if drifting else (0, 0)
        yield scores[row : row + SIDE, column : column + SIDE].ravel()


def half_planes(rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """Draw directions: a coalition is what lies on one side of a line."""
    position = np.arange(SIDE) - (SIDE - 1) / 2
    while True:
        angle = rng.random() * 2 * np.pi
        yield (np.cos(angle) * position[:, None] + np.sin(angle) * position).ravel()


SCHEMES = {
    "pixels": lambda rng: patch_scores(1, False, rng),
    "patches of 2 x 2": lambda rng: patch_scores(2, False, rng),
    "patches of 2 x 2, moved": lambda rng: patch_scores(2, True, rng),
    "patches of 4 x 4": lambda rng: patch_scores(4, False, rng),
    "patches of 4 x 4, moved": lambda rng: patch_scores(4, True, rng),
    "half planes": half_planes,
}


class Digits:
    """The trained network, with coalitions of its pixels."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.references = problem.references
        self.program = bound_program(problem.model, [self.references])
        count, outputs = len(self.references), problem.outputs
        self.grads = [unit.expand(count, -1).clone() for unit in torch.eye(outputs)]

    def differing(self, sample: Tensor) -> Tensor:
        """Return which pixels differ from each reference, of shape (references, pixels)."""
        return (sample != self.references).flatten(1)

    def explain(self, blocks: list[list[Tensor]], sample: Tensor) -> tuple[Tensor, float]:
        """Return the attributions of a sample, (pixels, outputs), and the idle share of passes."""
        samples = sample.expand_as(self.references)
        idle: list[float] = []

        def observe(start: Taps, end: Taps) -> None:
            equal = [float((start[tap] == end[tap]).double().mean()) for tap in start]
            idle.append(float(np.mean(equal)))

        passes = coalition_passes(self.program, [samples], [self.references], self.grads, observe)
        chains = CoalitionChains(2, blocks, None)
        multipliers = refined_multipliers(passes, chains)
        values = [(m * (samples - self.references)).mean(0).flatten() for (m,) in multipliers]
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
    header = ["coalitions of", *(f"{4 * k} passes" for k in PAIRS), "idle"]
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
