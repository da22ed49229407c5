"""Run the library on scikit-learn's digits: ``python -m fxshap.demo``.

The demo trains a small network that stock SHAP cannot explain, makes it explainable, and explains
it with the same two lines of SHAP. Every number that it prints is measured in that run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import shap
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxshap.module import make_explainable
from fxshap.verification.metrics import additivity_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

CLASSES = 10

#: The digits in the picture, one sample each.
DIGITS = (0, 3, 4, 7, 9)


class DigitNet(nn.Module):
    """An ordinary network, not written for attribution.

    It has a functional GELU, one GELU module that is called twice and an in-place residual sum.
    Hooks on modules miss the functional operations and confuse the two calls of one module.
    """

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.activation = nn.GELU()
        self.head = nn.Linear(channels * 4 * 4, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Map images of shape (batch, 1, 8, 8) to one logit per class."""
        identity = F.gelu(self.stem(image))
        out = self.activation(self.conv1(identity))
        out = F.gelu(self.conv2(out))
        out += identity
        out = self.activation(self.conv3(out))
        return self.head(F.avg_pool2d(out, 2).flatten(1))  # type: ignore[no-any-return]


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels, with pixels in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    split = train_test_split(
        images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    train_x, test_x, train_y, test_y = map(torch.from_numpy, split)
    return train_x, train_y, test_x, test_y


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 10) -> None:
    """Train with Adam on cross-entropy, in batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    model.eval()


# --- the picture --------------------------------------------------------------------------------


def draw(images: Array, attributions: Array, logits: Array, path: Path) -> None:
    """Save a picture with one row per image: the image, then its attributions for every class.

    Parameters
    ----------
    images : ndarray
        Shape (samples, 1, height, width).
    attributions : ndarray
        Shape (samples, 1, height, width, classes).
    logits : ndarray
        The model's output, shape (samples, classes).
    path : Path
        The file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scale = float(np.quantile(np.abs(attributions), 0.998))
    height = 1.36 * len(images) + 1.3
    figure, axes = plt.subplots(
        len(images),
        CLASSES + 2,
        figsize=(13.2, height),
        gridspec_kw={"width_ratios": [1, 0.12] + [1] * CLASSES, "wspace": 0.1, "hspace": 0.3},
    )
    figure.subplots_adjust(left=0.015, right=0.925, top=1 - 1.1 / height, bottom=0.33 / height)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(color="0.8")
    for ax in axes[:, 1]:
        ax.set_axis_off()
    for row, image, values, output in zip(axes, images, attributions, logits, strict=True):
        row[0].imshow(image[0], cmap="gray_r", vmin=0, vmax=1.15)
        for k, ax in enumerate(row[2:]):
            draw_attributions(ax, image[0], values[0, ..., k], scale, k == output.argmax())
    for ax, title in zip(axes[0], ["sample", "", *map(str, range(CLASSES))], strict=True):
        ax.set_title(title, fontsize=11, pad=6)
    add_heading(figure, height)
    add_colour_bar(figure, axes)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def draw_attributions(ax: Axes, image: Array, values: Array, scale: float, predicted: bool) -> None:
    """Draw the attributions of one image to one class, and the outline of the image over them.

    Parameters
    ----------
    ax : Axes
    image, values : ndarray
        Shape (height, width).
    scale : float
        The attribution with the strongest colour.
    predicted : bool
        Whether the model predicts this class; it then gets a frame.
    """
    ax.imshow(values, cmap="RdBu_r", vmin=-scale, vmax=scale)
    limits = ax.axis()
    side = range(-1, image.shape[-1] + 1)
    outline = np.pad(image, 1)
    ax.contour(side, side, outline, levels=[0.4], colors="0.25", linewidths=0.7, alpha=0.7)
    ax.axis(limits)
    total = f"{values.sum():+.1f}".replace("-", "\N{MINUS SIGN}")
    ax.set_xlabel(total, fontsize=9, labelpad=3, color="black" if predicted else "0.4")
    if predicted:
        ax.xaxis.label.set_fontweight("bold")
        ax.spines[:].set(color="black", linewidth=2.2)


def add_heading(figure: Figure, height: float) -> None:
    """Write the title and the description at the top of a figure, `height` inches high."""
    figure.text(
        0.015,
        1 - 0.12 / height,
        "Which pixels support which digit?",
        fontsize=15,
        weight="bold",
        va="top",
    )
    figure.text(
        0.015,
        1 - 0.47 / height,
        "Attributions to each class's logit, with their sum below (the prediction has a frame). "
        "Red raises the logit above its mean over the references, blue lowers it.",
        fontsize=10.5,
        color="0.35",
        va="top",
    )


def add_colour_bar(figure: Figure, axes: Any) -> None:
    """Add the colour bar of the attributions at the right of all axes."""
    bottom, top = axes[-1, -1].get_position().y0, axes[0, -1].get_position().y1
    bar_axes = figure.add_axes((0.94, bottom, 0.011, top - bottom))
    bar = figure.colorbar(axes[-1, -1].images[0], cax=bar_axes, extend="both")
    bar.set_label("attribution", fontsize=10)
    bar.ax.tick_params(labelsize=9, length=2)


# --- the steps ----------------------------------------------------------------------------------


def run_demo(path: Path) -> int:
    """Run the demo, save its picture at `path`, and return the exit status.

    The status is 1 if a package that the demo needs is not installed.
    """
    missing = missing_package("matplotlib", "sklearn")
    if missing:
        print(
            f"The demo needs {missing}, which is not installed: pip install 'fxshap[demo]'",
            file=sys.stderr,
        )
        return 1
    start = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more threads do not help a network this small, and may slow it down
    model, references, samples = trained_network()
    explain_with_stock_shap(model, references, samples)
    values = explain_with_fxshap(model, references, samples)
    headline("4. Draw the attributions")
    with torch.no_grad():
        logits = model(samples).numpy()
    draw(samples.numpy(), values, logits, path)
    print(f"saved {path}")
    print(f"\ndone in {time.perf_counter() - start:.0f} s")
    return 0


def missing_package(*names: str) -> str | None:
    """Return the name of the first package that cannot be imported; ``None`` if all can."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return error.name
    return None


def trained_network() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a trained network, 50 references and one sample of every digit in `DIGITS`."""
    headline("1. Train a small GELU network on scikit-learn's digits")
    train_x, train_y, test_x, test_y = load_digits()
    model = DigitNet()
    train(model, train_x, train_y)
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    print(f"accuracy on {len(test_x)} test images: {accuracy:.1%}")
    references = train_x[torch.randperm(len(train_x))[:50]]
    samples = torch.stack([test_x[test_y == digit][0] for digit in DIGITS])
    return model, references, samples


def explain_with_stock_shap(model: nn.Module, references: Tensor, samples: Tensor) -> None:
    """Explain the network as it is, and print SHAP's error and the additivity error."""
    headline("2. Stock SHAP, on the network as it is")
    print(">>> explainer = shap.DeepExplainer(model, references)")
    print(">>> values = explainer.shap_values(samples)")
    explainer = shap.DeepExplainer(model, references)
    try:
        explainer.shap_values(samples)
        print("SHAP's additivity check passed")
    except AssertionError as error:
        print(textwrap.fill(f"AssertionError: {error}", 96))
    values = explainer.shap_values(samples, check_additivity=False)
    print_additivity_error(model, references, samples, values)


def explain_with_fxshap(model: nn.Module, references: Tensor, samples: Tensor) -> Array:
    """Explain the explainable network, print the additivity error and return the attributions."""
    headline("3. The same two lines, on make_explainable(model)")
    print(">>> explainable = fxshap.make_explainable(model)")
    print(">>> explainer = shap.DeepExplainer(explainable, references)")
    print(">>> values = explainer.shap_values(samples)")
    explainable = make_explainable(model)
    explainer = shap.DeepExplainer(explainable, references)
    values: Array = explainer.shap_values(samples)
    print("SHAP's additivity check passed")
    print_additivity_error(model, references, samples, values)
    return values


def headline(text: str) -> None:
    """Print the title of a step."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def print_additivity_error(
    model: nn.Module, references: Tensor, samples: Tensor, values: Array
) -> None:
    """Measure and print the additivity error of attributions."""
    print(f"\nadditivity error: {additivity_error(model, references, samples, [values]):.1e}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the demo and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fxshap.demo", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("--output", type=Path, default=Path("fxshap_demo.png"), help="the picture")
    return run_demo(parser.parse_args(argv).output)


if __name__ == "__main__":
    sys.exit(main())
