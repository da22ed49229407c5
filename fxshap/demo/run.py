"""The demo: train a small network on scikit-learn's digits, and explain it with and without fxshap.

Stock SHAP cannot explain the network. The demo makes it explainable, explains it with the same two
lines of SHAP, and then with fxshap's own explainer. Every number that it prints is measured in that
run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shap
import torch
from torch import Tensor, nn

from fxshap.demo.network import DigitNet, load_digits, train
from fxshap.demo.pictures import draw, draw_comparison
from fxshap.explainer import DeepExplainer
from fxshap.module import ExplainableModule, make_explainable
from fxshap.verification.metrics import additivity_error

Array = npt.NDArray[Any]

#: The digits in the pictures, one sample each.
DIGITS = (0, 3, 4, 7, 9)
#: How many of them are in the picture that compares SHAP with fxshap.
COMPARED = 3
#: How many images are explained together.
MANY = 100


def run_demo(path: Path) -> int:
    """Run the demo, save its pictures, and return the exit status.

    Parameters
    ----------
    path : Path
        The file of the attributions to all classes. The comparison of stock SHAP with fxshap is
        saved next to it, with ``_before_after`` in its name.

    Returns
    -------
    int
        1 if a package that the demo needs is not installed, 0 otherwise.
    """
    missing = missing_package("matplotlib", "sklearn")
    if missing:
        print(
            f"The demo needs {missing}, which is not installed: "
            "pip install matplotlib scikit-learn",
            file=sys.stderr,
        )
        return 1
    start = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more threads do not help a network this small, and may slow it down
    model, references, samples = trained_network()
    before = explain_with_stock_shap(model, references, samples)
    explainable = make_explainable(model)
    after = explain_with_fxshap(explainable, references, samples)
    explain_many(explainable, references)
    headline("5. Draw the attributions")
    with torch.no_grad():
        logits, expected = model(samples).numpy(), model(references).mean(0).numpy()
    draw(samples.numpy(), after, logits, path)
    compared = path.with_stem(f"{path.stem}_before_after")
    predicted = logits.argmax(1)[:COMPARED]
    draw_comparison(
        samples.numpy()[:COMPARED],
        {
            "SHAP": of_class(before, predicted),
            "SHAP with fxshap": of_class(after, predicted),
        },
        (logits - expected)[range(COMPARED), predicted],
        compared,
    )
    print(f"saved {path}\nsaved {compared}")
    print(f"\ndone in {time.perf_counter() - start:.0f} s")
    return 0


def of_class(values: Array, classes: Array) -> Array:
    """Return the attributions of one class of each sample, of shape (samples, height, width)."""
    return np.stack([values[row, 0, ..., k] for row, k in enumerate(classes)])


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


def explain_with_stock_shap(model: nn.Module, references: Tensor, samples: Tensor) -> Array:
    """Explain the network as it is, print SHAP's error, and return the attributions."""
    headline("2. Stock SHAP, on the network as it is")
    print(">>> explainer = shap.DeepExplainer(model, references)")
    print(">>> values = explainer.shap_values(samples)")
    explainer = shap.DeepExplainer(model, references)
    try:
        explainer.shap_values(samples)
        print("SHAP's additivity check passed")
    except AssertionError as error:
        print(textwrap.fill(f"AssertionError: {error}", 96))
    values: Array = explainer.shap_values(samples, check_additivity=False)
    print_additivity_error(model, references, samples, values)
    return values


def explain_with_fxshap(
    explainable: ExplainableModule, references: Tensor, samples: Tensor
) -> Array:
    """Explain the explainable network, print the additivity error and return the attributions."""
    headline("3. The same two lines, on make_explainable(model)")
    print(">>> explainable = fxshap.make_explainable(model)")
    print(">>> explainer = shap.DeepExplainer(explainable, references)")
    print(">>> values = explainer.shap_values(samples)")
    explainer = shap.DeepExplainer(explainable, references)
    values: Array = explainer.shap_values(samples)
    print("SHAP's additivity check passed")
    print_additivity_error(explainable, references, samples, values)
    return values


def explain_many(explainable: ExplainableModule, references: Tensor) -> None:
    """Explain many images together, and print how long it took."""
    headline(f"4. {MANY} images together, with base values for SHAP's plots")
    print(">>> explainer = fxshap.DeepExplainer(explainable, references)")
    print(">>> explanation = explainer(images)")
    images = load_digits()[2][:MANY]
    explainer = DeepExplainer(explainable, references)
    start = time.perf_counter()
    explanation = explainer(images)
    seconds = time.perf_counter() - start
    print(f"explained {len(images)} images and all classes in {seconds:.1f} s")
    print(f"values {explanation.values.shape}, base values {explanation.base_values.shape}")


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
    parser = argparse.ArgumentParser(prog="python -m fxshap.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("fxshap_demo.png"), help="the picture")
    return run_demo(parser.parse_args(argv).output)
