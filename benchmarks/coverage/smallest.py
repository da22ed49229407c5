"""Find the smallest network of every module of timm, and a small image it works on.

``python -m benchmarks.coverage.smallest`` tries to build every network of timm, which takes many
minutes, and writes what it finds to a file that the measurement reads.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import benchmarks.coverage.torchvision_import  # noqa: F401

TABLE = Path(__file__).with_name("timm.json")
#: Sides of images to try before a network's own, which is often 224 or more.
SIDES = (128, 112, 160, 192)

Choice = dict[str, Any]


def read_choices() -> dict[str, Choice]:
    """Return for each module its network, its keyword arguments and the side of its images."""
    choices: dict[str, Choice] = json.loads(TABLE.read_text())
    return choices


def write_choices(choices: dict[str, Choice]) -> None:
    """Write one line a module."""
    lines = [f"{json.dumps(module)}: {json.dumps(choice)}" for module, choice in choices.items()]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def smallest(module: str) -> Choice:
    """Choose the network of a module with the fewest parameters."""
    import timm

    sizes = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            try:
                network = timm.create_model(name)
            except Exception:  # one that cannot be built without storage is never the smallest
                continue
        sizes[name] = sum(p.numel() for p in network.parameters())
    return choose_side(min(sizes, key=lambda key: (sizes[key], key)))


def choose_side(name: str) -> Choice:
    """Choose a small image that a network takes, with ``img_size`` where it wants to be told."""
    import timm

    own: int = timm.get_pretrained_cfg(name).input_size[-1]
    for side in (*(side for side in SIDES if side < own), own):
        for kwargs in ({}, {"img_size": side}):
            try:
                network = timm.create_model(name, **kwargs)
                check_runs(network, side)
            except Exception:  # it does not take this size in this way
                continue
            return {"name": name, "kwargs": kwargs, "side": side}
    raise RuntimeError(f"{name} runs on none of its images")


@torch.no_grad()
def check_runs(network: nn.Module, side: int) -> None:
    """Run a network in both modes."""
    images = torch.randn(2, 3, side, side)
    network.train()(images)
    network.eval()(images)


def main() -> None:
    """Write the table."""
    import timm

    warnings.simplefilter("ignore")
    choices = {module: smallest(module) for module in tqdm(timm.list_modules(), unit="module")}
    write_choices(choices)


if __name__ == "__main__":
    main()
