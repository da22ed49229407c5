"""Additivity errors in low precision: half precision, and autocast inside the model.

Run with ``make low-precision``; writes its section of ``docs/reliability.md``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from tests.networks import NETWORKS
from tests.networks.low_precision import DTYPES, LIMIT, VARIANTS, build, error_in_units
from tests.tools.pages import replace_section

PAGE = Path("docs/reliability.md")
#: For every variant and type the error of every network that PyTorch runs.
Errors = dict[tuple[str, torch.dtype], dict[str, float]]


def measure() -> Errors:
    """Measure every network in every variant and type."""
    found: Errors = {}
    cases = list(itertools.product(VARIANTS, DTYPES, NETWORKS))
    for variant, dtype, name in tqdm(cases, unit="network"):
        model = build(name, variant, dtype)
        if model is not None:
            error = error_in_units(model, NETWORKS[name], dtype)
            found.setdefault((variant, dtype), {})[name] = error
    return found


def table(found: Errors) -> str:
    """Tabulate the median and the largest error of every variant and type."""
    rows = []
    for (variant, dtype), errors in found.items():
        worst = max(errors, key=errors.__getitem__)
        rows.append(
            [
                variant,
                str(dtype).removeprefix("torch."),
                f"{len(errors)} of {len(NETWORKS)}",
                f"{np.median(list(errors.values())):.1f}",
                f"{errors[worst]:.1f} ({worst})",
            ]
        )
    headers = ["", "type", "networks that PyTorch runs", "median", "worst"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main() -> int:
    """Measure, print and write the section; return 1 if an error is over the limit."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.low_precision", description=__doc__
    )
    parser.parse_args()
    warnings.simplefilter("ignore")
    found = measure()
    when = f"`make low-precision`, {date.today()}, torch {torch.__version__}, on the CPU."
    text = f"{table(found)}\n\n{when}"
    print(text)
    replace_section(PAGE, "low precision", text)
    return int(any(not e <= LIMIT for errors in found.values() for e in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
