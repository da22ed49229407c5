"""Draw the relative error of GELU's multiplier in float32.

Run ``python -m benchmarks.accuracy.gelu_error``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fxshap.rules.gelu import gelu_erf_secant
from tests.rules.gelu_reference import reference

FIGURE = Path("docs/figures/gelu_error.png")


# --- the rules compared -------------------------------------------------------------------------


def quotient(r: Tensor, x: Tensor) -> Tensor:
    """(f(x) - f(r)) / (x - r) as it stands."""
    gelu = torch.nn.functional.gelu
    return (gelu(x) - gelu(r)) / (x - r)


def derivative(z: Tensor) -> Tensor:
    """GELU's derivative, by autograd."""
    z = z.detach().requires_grad_()
    (grad,) = torch.autograd.grad(torch.nn.functional.gelu(z).sum(), z)
    return grad


def shap_rule(r: Tensor, x: Tensor) -> Tensor:
    """The quotient, but the derivative where |d| < 1e-6: ``nonlinear_1d`` of shap 0.51.0."""
    return torch.where((x - r).abs() < 1e-6, derivative(r), quotient(r, x))


def midpoint(r: Tensor, x: Tensor) -> Tensor:
    """The derivative half way."""
    return derivative((r + x) / 2)


RULES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "SHAP's rule": (shap_rule, "#c0392b"),
    "quotient": (quotient, "#e08e0b"),
    "midpoint derivative": (midpoint, "#2c7fb8"),
    "fxshap": (gelu_erf_secant, "#1a7f37"),
}


# --- the picture --------------------------------------------------------------------------------


def errors_by_difference(points: int = 240) -> tuple[Tensor, dict[str, Tensor]]:
    """Relative errors in float32, (differences, points), of every rule at d from 1e-9 to 1e2."""
    d = torch.logspace(-9, 2, 89, dtype=torch.float64)[:, None]
    # Points of both signs between 1e-3 and 5, so that x + d is another float32 for small d too.
    size = torch.logspace(-3, math.log10(5), points // 2, dtype=torch.float64)
    r = torch.cat([-size, size]).float().expand(len(d), -1)
    x = (r.double() + d).float()
    true, _ = reference("erf", r, x)
    errors = {
        name: ((rule(r, x).double() - true) / true).abs() for name, (rule, _) in RULES.items()
    }
    return d.flatten(), errors


#: Where each rule's name stands: (|d|, relative error) on the left panel.
LABELS = {
    "SHAP's rule": (1.2e-9, 1e-4),
    "quotient": (1.5e-7, 2e-1),
    "midpoint derivative": (2e-4, 3e-1),
    "fxshap": (3e-5, 8e-9),
}


def draw(path: Path = FIGURE) -> None:
    """Draw median and largest relative error against |d|; an error of 1 is no digit right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    d, errors = errors_by_difference()
    style = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, panels = plt.subplots(1, 2, figsize=(11.5, 4.8), sharey=True)
        for name, (_, color) in RULES.items():
            clipped = errors[name].nan_to_num(1.0).clamp(min=1e-9, max=1.0)  # 0 / 0 is no digit
            # SHAP's rule and the quotient are the same from 1e-6 on: dashes over a line.
            dashes = {"ls": (0, (3, 2)), "zorder": 3} if name == "SHAP's rule" else {}
            panels[0].plot(d, clipped.median(1).values, color=color, lw=2.2, **dashes)
            panels[1].plot(d, clipped.amax(1), color=color, lw=2.2, **dashes)
            panels[0].text(*LABELS[name], name, color=color, weight="bold")
        for panel, which in zip(panels, ("median", "largest"), strict=True):
            panel.set(xscale="log", yscale="log", xlabel="|x − r|", ylim=(3e-9, 2))
            panel.set_title(f"{which} over x", fontsize=13)
            panel.grid(alpha=0.25)
        panels[0].set_ylabel("relative error of GELU's multiplier")
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.gelu_error", description=__doc__
    )
    parser.parse_args()
    draw()
    print(f"saved {FIGURE}")


if __name__ == "__main__":
    main()
