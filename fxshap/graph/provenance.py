"""Where in the user's model a node of a graph came from."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import fx

#: What is said of an operation that no line of the user's is known for.
UNKNOWN_LINE = "an unknown line"


def user_module(node: fx.Node) -> str:
    """Return the qualified name of the user's module that a node came from; '' for the model."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    below = [path for path in paths if path.partition(".")[0] == "model"]  # export adds others
    return whole_list(below[-1].removeprefix("model").removeprefix(".")) if below else ""


def whole_list(path: str) -> str:
    """Name a module of a part of a list, as ``layers[1:]`` makes one, by its place in the list."""
    # The start and the step of the slice, and the place in what it gives.
    part = r"slice\((None|\d+), (?:None|-?\d+), (None|\d+)\)\.(\d+)"

    def place(found: re.Match[str]) -> str:
        start, step, k = (
            default if text == "None" else int(text)
            for text, default in zip(found.groups(), (0, 1, 0), strict=True)
        )
        return str(start + k * step)

    return re.sub(part, place, path)


def source_line(node: fx.Node) -> str:
    """Return the user's line that a node came from: ``file:line (`code`)``."""
    lines = re.findall(r'File "(.+?)", line (\d+), in .*\n\s*(.*)', node.stack_trace or "")
    found = [(file, int(line), code) for file, line, code in lines if is_user_file(file)]
    return "{}:{} (`{}`)".format(*found[-1]) if found else UNKNOWN_LINE


def is_user_file(file: str) -> bool:
    """Say whether a source file is the user's, and not of torch, fxshap or Python."""
    path, stdlib = Path(file), Path(sysconfig.get_path("stdlib"))
    ours = [Path(torch.__file__).parent, Path(__file__).parents[1]]
    installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    in_python = file.startswith("<") or (path.is_relative_to(stdlib) and not installed)
    return not in_python and not any(path.is_relative_to(folder) for folder in ours)


#: What says where in the user's model a node came from.
PROVENANCE_KEYS = ("nn_module_stack", "stack_trace")


def provenance_of(node: fx.Node) -> dict[str, Any]:
    """Return what says where in the user's model a node came from."""
    return {key: node.meta[key] for key in PROVENANCE_KEYS if key in node.meta}


def describe_location(node: fx.Node) -> str:
    """Name a node and the user's module and line that it came from, for messages."""
    module, line = user_module(node), source_line(node)
    place = f"{node.name} in {module}" if module else node.name
    return place if line == UNKNOWN_LINE else f"{place}, {line.partition(' (')[0]}"
