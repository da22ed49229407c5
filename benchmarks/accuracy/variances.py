"""A rule for a linear layer together with its activation, compared with the secant.

A secant gives all inputs of a unit one slope, f(z_x) - f(z_r) over z_x - z_r. The Shapley value of
an input averages over what the others have already added: with u_j = w_j (x_j - r_j), the sum of a
random part of the others lies around the straight line between z_r and z_x with a variance of
t (1 - t) sum u^2, which is sum u^2 / 6 on the average over t (Ancona et al. 2019 propagate such
variances). The library's rule for ``rule="variance"`` (:mod:`fxshap.rules.smoothed_activations`) is

    m_j = w_j (S + T u_j),    S = secant of z -> E f(z + N(0, sum u^2 / 6)),
    T = (f(z_x) - f(z_r) - S (z_x - z_r)) / sum u^2,

with three points for the mean, and with the secants from z_r to the mean of z over the coalitions
and on to z_x. Here it is compared with others, for perceptrons of many depths: with straight
secants from z_r to z_x, and with nine points.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

import fxshap
from fxshap.runtime.shapley import coalitions, shapley_weights
from fxshap.verification.shapley import shapley_values
from tests.tools.pages import replace_section

PAGE = Path("docs/refinement.md")
FEATURES, WIDTH, OUTPUTS, PAIRS, SEEDS = 10, 24, 3, 16, 6
DEPTHS = (1, 2, 4, 8)

Function = Callable[[Tensor], Tensor]
#: Maps the function of a layer, both endpoints, u, of shape (rows, units, inputs), and the shift of
#: the mean to slopes.
Rule = Callable[[Function, Tensor, Tensor, Tensor, Tensor], Tensor]

ACTIVATIONS: dict[str, Function] = {
    "ReLU": torch.relu,
    "hardtanh": F.hardtanh,
    "GELU": F.gelu,
    "tanh": torch.tanh,
}


def secant(f: Function, r: Tensor, x: Tensor, u: Tensor, shift: Tensor) -> Tensor:
    """One slope for all inputs of a unit (the rescale rule)."""
    return ((f(x) - f(r)) / (x - r)).unsqueeze(-1).expand_as(u)


def reveal_cancel(f: Function, r: Tensor, x: Tensor, u: Tensor, shift: Tensor) -> Tensor:
    """One slope for what raises the unit and one for the rest (Shrikumar et al. 2017, 3.5.3)."""
    up, down = u.clamp(min=0).sum(-1), u.clamp(max=0).sum(-1)
    raised = (f(r + up) - f(r) + f(x) - f(r + down)) / 2
    lowered = (f(r + down) - f(r) + f(x) - f(r + up)) / 2
    slopes = [
        change / side.masked_fill(side == 0, 1.0)
        for change, side in ((raised, up), (lowered, down))
    ]
    return torch.where(u > 0, slopes[0].unsqueeze(-1), slopes[1].unsqueeze(-1))


def mean_over_normal(
    points: Tensor, weights: Tensor, f: Function, z: Tensor, variance: Tensor
) -> Tensor:
    """The mean of f(z + N(0, variance)), taken at some points."""
    return f(z.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * points) @ weights


def smoothed(
    points: Tensor,
    weights: Tensor,
    shifted: bool,
    f: Function,
    r: Tensor,
    x: Tensor,
    u: Tensor,
    shift: Tensor,
) -> Tensor:
    """S + T u, with the mean over a normal number taken at some points, and with shifts or not."""
    square = u.square().sum(-1)
    mean = partial(mean_over_normal, points, weights, f)
    start, end = mean(r, square / 6), mean(x, square / 6)
    if shifted:
        z = (r + x) / 2 + shift * 4 / 3
        middle = mean(z, square / 6)
        slope = ((middle - start) / (z - r) + (end - middle) / (x - z)) / 2
    else:
        slope = (end - start) / (x - r)
    rest = (f(x) - f(r) - slope * (x - r)) / square
    return slope.unsqueeze(-1) + rest.unsqueeze(-1) * u


#: Points and weights of the mean over a standard normal number: the library's, and nine.
THREE = torch.tensor([-(2**0.5), 0.0, 2**0.5]).double(), torch.tensor([0.25, 0.5, 0.25]).double()
NINE = tuple(torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(9))

RULES: dict[str, Rule] = {
    "secant": secant,
    "RevealCancel": reveal_cancel,
    "S + T u, straight secants": partial(smoothed, *THREE, False),
    "S + T u (the library's)": partial(smoothed, *THREE, True),
    "S + T u, nine points": partial(smoothed, NINE[0], NINE[1] / NINE[1].sum(), True),
}


class Perceptron:
    """A network of linear layers with one activation, drawn at random."""

    def __init__(self, f: Function, depth: int, seed: int) -> None:
        torch.manual_seed(seed)
        sizes = [FEATURES, *[WIDTH] * depth, OUTPUTS]
        self.f = f
        self.layers = [
            (1.7 * (2 * torch.rand(b, a) - 1) / a**0.5, (2 * torch.rand(b) - 1) / a**0.5)
            for a, b in zip(sizes, sizes[1:], strict=False)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """Run it."""
        *hidden, (weight, bias) = self.layers
        for w, b in hidden:
            x = self.f(x @ w.T + b)
        return x @ weight.T + bias

    def multipliers(self, rule: Rule, x: Tensor, r: Tensor) -> Tensor:
        """Return the multipliers of one pass, of shape (rows, outputs, features)."""
        *hidden, (last, _) = self.layers
        found, shift = [], torch.zeros_like(x)
        for w, b in hidden:
            z_x, z_r, shift_z, u = x @ w.T + b, r @ w.T + b, shift @ w.T, w * (x - r).unsqueeze(1)
            found.append(w * rule(self.f, z_r, z_x, u, shift_z))
            x, r = self.f(z_x), self.f(z_r)
            half = (z_x + z_r) / 2 + shift_z, u.square().sum(-1) / 4
            shift = mean_over_normal(*THREE, self.f, *half) - (x + r) / 2
        total = last.expand(len(x), -1, -1)
        for matrix in reversed(found):
            total = total @ matrix
        return total

    def attributions(self, rule: Rule, x: Tensor, r: Tensor) -> Tensor:
        """Return the attributions of one pass, of shape (rows, features, outputs)."""
        return (self.multipliers(rule, x, r) * (x - r).unsqueeze(1)).mT


def distances(f: Function, depth: int, seed: int) -> dict[str, float]:
    """Return the distance of every rule, of one pass, to the exact values on one network."""
    network = Perceptron(f, depth, seed)
    x, r = torch.randn(PAIRS, FEATURES), torch.randn(PAIRS, FEATURES)
    exact = torch.stack([shapley_values(network, a, b) for a, b in zip(x, r, strict=True)])
    change = network(x) - network(r)
    found = {}
    for name, rule in RULES.items():
        values = network.attributions(rule, x, r)
        assert (values.sum(1) - change).abs().max() < 1e-9 * network(x).abs().max(), name
        found[name] = float((values - exact).abs().sum() / exact.abs().sum())
    return found


def layer_table() -> str:
    """Tabulate the medians over networks of every activation and depth."""
    rows = []
    for activation, f in ACTIVATIONS.items():
        for name in RULES:
            row = [activation if name == "secant" else "", name]
            for depth in DEPTHS:
                each = [distances(f, depth, seed)[name] for seed in range(SEEDS)]
                row.append(f"{statistics.median(each):.3f}")
            rows.append(row)
    header = ["activation", "rule", *(f"{depth} hidden" for depth in DEPTHS)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


# --- softmax as the output ----------------------------------------------------------------------

#: Maps logits at both endpoints to the multiplier of every output for every logit.
Softmax = Callable[[Tensor, Tensor], Tensor]


def closed(r: Tensor, x: Tensor) -> Tensor:
    """Return the library's rule."""
    d, y_r, y_x = x - r, r.softmax(-1), x.softmax(-1)
    change = (x.logsumexp(-1) - r.logsumexp(-1)).unsqueeze(-1)
    own = (y_x - y_r) / (d - change)
    whole = (x.exp().sum(-1) - r.exp().sum(-1)).unsqueeze(-1)
    moved = change / whole * (x.exp() - r.exp()) / d
    return torch.diag_embed(own) - own.unsqueeze(-1) * moved.unsqueeze(-2)


def along_the_path(r: Tensor, x: Tensor) -> Tensor:
    """Return the mean of the derivative along the straight line (integrated gradients)."""
    points, weights = np.polynomial.legendre.leggauss(16)
    total = torch.zeros(())
    for point, weight in zip(points, weights, strict=True):
        y = torch.lerp(r, x, float(point + 1) / 2).softmax(-1)
        total = total + weight / 2 * (torch.diag_embed(y) - y.unsqueeze(-1) * y.unsqueeze(-2))
    return total


def game_of_logits(r: Tensor, x: Tensor) -> Tensor:
    """Return the exact Shapley values with the logits as players."""
    players = r.shape[-1]
    points = torch.where(coalitions(players), x.unsqueeze(1), r.unsqueeze(1))
    return ((shapley_weights(coalitions(players)) @ points.softmax(-1)) / (x - r).unsqueeze(-1)).mT


SOFTMAX: dict[str, Softmax] = {
    "closed (the library's)": closed,
    "mean derivative along the path": along_the_path,
    "exact game of the logits": game_of_logits,
}


def softmax_table() -> str:
    """Tabulate the medians over networks that end in a softmax over four logits."""
    rows = []
    for name, rule in SOFTMAX.items():
        row = [name]
        for hidden in (False, True):
            each = []
            for seed in range(SEEDS):
                torch.manual_seed(seed)
                first = 1.7 * (2 * torch.rand(WIDTH, FEATURES) - 1) / FEATURES**0.5
                inside = WIDTH if hidden else FEATURES
                last = 3 * (2 * torch.rand(4, inside) - 1) / inside**0.5

                def network(
                    x: Tensor, first: Tensor = first, last: Tensor = last, hidden: bool = hidden
                ) -> Tensor:
                    return (torch.tanh(x @ first.T) if hidden else x) @ last.T

                def probabilities(x: Tensor, network: Function = network) -> Tensor:
                    return network(x).softmax(-1)

                x, r = torch.randn(PAIRS, FEATURES), torch.randn(PAIRS, FEATURES)
                slopes = rule(network(r), network(x)) @ last
                if hidden:
                    z_x, z_r = x @ first.T, r @ first.T
                    secants = (torch.tanh(z_x) - torch.tanh(z_r)) / (z_x - z_r)
                    slopes = (slopes * secants.unsqueeze(1)) @ first
                values = (slopes * (x - r).unsqueeze(1)).mT
                exact = torch.stack(
                    [shapley_values(probabilities, a, b) for a, b in zip(x, r, strict=True)]
                )
                each.append(float((values - exact).abs().sum() / exact.abs().sum()))
            row.append(f"{statistics.median(each):.3f}")
        rows.append(row)
    header = ["rule", "logits linear in the input", "a tanh layer before"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.variances", description=__doc__
    )
    parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    layers, softmax = layer_table(), softmax_table()
    print(layers, softmax, sep="\n\n")
    command = "python -m benchmarks.accuracy.variances"
    when = f"`{command}`, {datetime.date.today()}, torch {torch.__version__}"
    replace_section(PAGE, "layers", f"{when}, fxshap {fxshap.__version__}.\n\n{layers}")
    replace_section(PAGE, "softmax", softmax)
    return 0


if __name__ == "__main__":
    sys.exit(main())
