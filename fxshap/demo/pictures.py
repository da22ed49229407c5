"""The pictures of the demo: attributions to every class, and stock SHAP compared with fxshap."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fxshap.demo.network import CLASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]


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
    draw_outlined(ax, image, values, scale)
    color = "black" if predicted else "0.4"
    ax.set_xlabel(signed(values.sum()), fontsize=9, labelpad=3, color=color)
    if predicted:
        ax.xaxis.label.set_fontweight("bold")
        ax.spines[:].set(color="black", linewidth=2.2)


def draw_outlined(ax: Axes, image: Array, values: Array, scale: float) -> None:
    """Draw attributions, with the outline of the image over them."""
    ax.imshow(values, cmap="RdBu_r", vmin=-scale, vmax=scale)
    limits = ax.axis()
    side = range(-1, image.shape[-1] + 1)
    outline = np.pad(image, 1)
    ax.contour(side, side, outline, levels=[0.4], colors="0.25", linewidths=0.7, alpha=0.7)
    ax.axis(limits)


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


def draw_comparison(images: Array, values: dict[str, Array], changes: Array, path: Path) -> None:
    """Save a picture with one row per image: the image, then the attributions of each method.

    Parameters
    ----------
    images : ndarray
        Shape (samples, 1, height, width).
    values : dict of str to ndarray
        The attributions of the predicted class by the title of the method, each of shape
        (samples, height, width).
    changes : ndarray
        The output of the predicted class minus its mean over the references, shape (samples,).
        Attributions that add up sum to it.
    path : Path
        The file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(images), 1 + len(values), figsize=(6.6, 2.3 * len(images) + 0.4), squeeze=False
    )
    figure.set_layout_engine("constrained")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(color="0.8")
    for row, (ax, *others) in enumerate(axes):
        ax.imshow(images[row, 0], cmap="gray_r", vmin=0, vmax=1.15)
        ax.set_xlabel(f"change of the logit: {signed(changes[row])}", fontsize=10)
        scale = max(float(np.abs(method[row]).max()) for method in values.values())
        for ax, attributions in zip(others, values.values(), strict=True):
            draw_outlined(ax, images[row, 0], attributions[row], scale)
            total = attributions[row].sum()
            adds_up = abs(total - changes[row]) <= 1e-3 * abs(changes[row])
            colour = "#1a7f37" if adds_up else "#cf222e"
            verdict = "adds up" if adds_up else "does not add up"
            ax.set_xlabel(f"sum: {signed(total)} ({verdict})", fontsize=10, color=colour)
    for ax, title in zip(axes[0], ["sample", *values], strict=True):
        ax.set_title(title, fontsize=11, pad=6)
    figure.suptitle("Attributions of the predicted digit", fontsize=14, weight="bold")
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def signed(value: float) -> str:
    """Format a number with its sign and one decimal."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
