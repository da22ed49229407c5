"""How near one backward pass can come, whatever the rules of single operations are.

The rule of every operation is replaced by its mean over the coalition game: between the reference
and many random hybrids of both inputs, and between these and the sample,

    m = mean of (m(r, h) + m(h, x)) / 2 over complementary pairs of hybrids h,

and what this lacks of the finite difference is shared by the sizes of the attributions, as in the
generic rule. No rule that sees its own operation only, such as that of ``rule="variance"``, knows
more of the game. What remains is the error of multiplying the means of successive operations.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.accuracy.measurement import build, exact_values, explain, with_fxshap
from benchmarks.adapters import join, split
from benchmarks.programs import bound_program
from fxshap.autograd import rescale
from fxshap.autograd.tape import Taps
from fxshap.rules.core.correction import correct
from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.runtime.program import Program
from tests.networks import NETWORKS, Network
from tests.tools.pages import replace_section

PAGE = Path("docs/refinement.md")
PAIRS, HYBRIDS = 6, 20
FAMILIES = ("activations", "attention", "recurrent", "normalisation", "pooling", "softmax")
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"rule": "variance"}, {"refine": 1})
COLUMNS = (
    "one pass", '`rule="variance"`', "means, 1 pair", f"means, {HYBRIDS} pairs", "`refine=1`",
)  # fmt: skip

Tensors = Sequence[Tensor]


class MeanRule:
    """Stands for `apply_rule`, and averages it over hybrids.

    Parameters
    ----------
    taps : dict of str to Tensor
        Those of the reference, whose very tensors the rules receive.
    hybrids : list of dict
        The taps of hybrids.
    """

    def __init__(self, taps: Taps, hybrids: list[Taps]) -> None:
        self.names = {id(value): name for name, value in taps.items()}
        self.hybrids = hybrids

    def __call__(
        self, operation: Operation, reference: Tensors, sample: Tensors, grad: Any
    ) -> tuple[Tensor | None, ...]:
        """Return the mean, corrected; the rule itself where values are masked by infinities."""
        names = [self.names[id(value)] for value in reference]
        points = [[taps[name] for name in names] for taps in self.hybrids]
        ends = [end for h in points for end in ((reference, h), (h, sample))]
        each = [apply_rule(operation, start, end, grad) for start, end in ends]
        means = [
            None if ms[0] is None else torch.stack([m.sum_to_size(r.shape) for m in ms]).mean(0)
            for ms, r in zip(zip(*each, strict=True), reference, strict=True)
        ]
        found = correct(operation, reference, sample, grad, means)
        if all(m is None or bool(m.isfinite().all()) for m in found):
            return found
        return apply_rule(operation, reference, sample, grad)


def hybrids(program: Program, network: Network, x: Tensor, r: Tensor, pairs: int) -> list[Taps]:
    """Return the taps of random halves of the features from the sample, and of the other halves."""
    rng, taps = np.random.default_rng(0), []
    for _ in range(pairs):
        orders = [rng.permutation(x.shape[1]) < x.shape[1] // 2 for _ in x]
        chosen = torch.from_numpy(np.stack(orders))
        for half in (chosen, ~chosen):
            points = split(torch.where(half, x, r), network.shapes)
            taps.append(program.tapped(points)[1])
    return taps


def distances(network: Network) -> list[float]:
    """Return the distance of every column on one network."""
    x, r = (network.inputs(PAIRS, seed=seed, dtype=torch.float64) for seed in (1, 2))
    exact = exact_values(network, x, r)
    one_pass, variances, refined = (
        explain(partial(with_fxshap, **options), network, x, r) for options in OPTIONS
    )
    means = [averaged(network, join(x), join(r), pairs) for pairs in (1, HYBRIDS)]
    return [
        float((values - exact).abs().sum() / exact.abs().sum())
        for values in (one_pass, variances, *means, refined)
    ]


def averaged(network: Network, x: Tensor, r: Tensor, pairs: int) -> Tensor:
    """Return the attributions of one pass of mean rules, of shape (pairs, features, outputs)."""
    references = split(r, network.shapes)
    program = bound_program(build(network), references)
    tape = program.tape(references)
    sample = program.tapped(split(x, network.shapes))[1]
    rule = MeanRule(tape.references, hybrids(program, network, x, r, pairs))
    values = []
    with mock.patch.object(rescale, "apply_rule", rule):
        for output in range(tape.output.shape[1]):
            grad = torch.zeros_like(tape.output)
            grad[:, output] = 1
            (multipliers,) = tape.backward_many(tape.references, sample, [grad])
            values.append(join(multipliers) * (x - r))
    return torch.stack(values, -1)


def table(families: Sequence[str]) -> str:
    """Tabulate the medians over the networks of every family."""
    rows = []
    for family in families:
        each = [distances(n) for n in NETWORKS.values() if n.family == family]
        medians = [f"{statistics.median(column):.3f}" for column in zip(*each, strict=True)]
        rows.append([family, len(each), *medians])
        print(rows[-1], flush=True)
    header = ["family", "networks", *COLUMNS]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.local_averages", description=__doc__
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = table(arguments.families)
    print(text)
    if [*arguments.families] != [*FAMILIES]:
        return 0
    command = "python -m benchmarks.accuracy.local_averages"
    replace_section(PAGE, "means", f"`{command}`, torch {torch.__version__}.\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
