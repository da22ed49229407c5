"""Draw the relative error of GELU's multiplier in float32.

Run ``python -m benchmarks.accuracy.gelu_error``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import mpmath
import torch
from torch import Tensor

from fxshap.rules.gelu import gelu_slope, gelu_tanh_slope

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "gelu_error.png"
DIGITS = 60
FORMS = ("erf", "tanh")


# --- the reference ------------------------------------------------------------------------------


def exact_phi(form: str, z: mpmath.mpf) -> mpmath.mpf:
    """P(z) of GELU(z) = z P(z)."""
    if form == "erf":
        return mpmath.erfc(-z / mpmath.sqrt(2)) / 2
    u = 2 * mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3)
    return 1 / (1 + mpmath.exp(-u))


def exact_phi_derivative(form: str, z: mpmath.mpf) -> mpmath.mpf:
    """P'(z)."""
    if form == "erf":
        return mpmath.npdf(z)
    p = exact_phi(form, z)
    du = 2 * mpmath.sqrt(2 / mpmath.pi) * (1 + 3 * mpmath.mpf("0.044715") * z**2)
    return p * exact_phi(form, -z) * du


def reference(form: str, r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the multiplier at 60 digits, and the magnitude of its two terms.

    The multiplier is m = mean(P) + mean(x) dP/d; the magnitude is |mean(P)| + |mean(x) dP/d|.
    """
    true, magnitude = [], []
    values: dict[float, mpmath.mpf] = {}

    def phi(z: float) -> mpmath.mpf:
        if z not in values:
            values[z] = exact_phi(form, mpmath.mpf(z))
        return values[z]

    with mpmath.workdps(DIGITS):
        for a, b in zip(r.flatten().tolist(), x.flatten().tolist(), strict=True):
            p_a, p_b = phi(a), phi(b)
            d = mpmath.mpf(b) - mpmath.mpf(a)
            slope = (p_b - p_a) / d if d else exact_phi_derivative(form, mpmath.mpf(a))
            first, second = (p_a + p_b) / 2, (mpmath.mpf(a) + b) / 2 * slope
            true.append(float(first + second))
            magnitude.append(float(first + abs(second)))
    return tuple(torch.tensor(v, dtype=torch.float64).reshape(r.shape) for v in (true, magnitude))


def slopes(form: str, r: Tensor, x: Tensor) -> Tensor:
    """The library's own multiplier."""
    return gelu_slope(r, x) if form == "erf" else gelu_tanh_slope(r, x)


def grid(dtype: torch.dtype, points: int, low: float = -40, high: float = 40) -> tuple[Tensor, ...]:
    """Ends (points, differences): d = 0, and |d| from 1e-12 to 1e2 with both signs."""
    sizes = torch.logspace(-12, 2, 29, dtype=torch.float64)
    d = torch.cat([torch.zeros(1), sizes, -sizes])
    wide = torch.linspace(low, high, points, dtype=torch.float64)
    r = torch.cat([wide, torch.linspace(-3, 3, points // 2)])[:, None].to(dtype)
    x = (r.double() + d).to(dtype)
    return r.expand_as(x), x


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
    "fxshap": (gelu_slope, "#1a7f37"),
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


if __name__ == "__main__":
    draw()
    print(f"saved {FIGURE}")
