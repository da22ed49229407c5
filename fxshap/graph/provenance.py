"""Where in the user's model a node of a graph came from."""

from __future__ import annotations

import linecache
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import fx

#: What messages say if no line of the user's code is known for an operation.
UNKNOWN_LINE = "an unknown line"

#: The most characters of a quoted line of code.
MAX_CODE_WIDTH = 80


def user_module(node: fx.Node) -> str:
    """Return the qualified name of the user's module that a node came from; '' for the model."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    below = [path for path in paths if path.partition(".")[0] == "model"]  # export adds others
    return resolve_slices(below[-1].removeprefix("model").removeprefix(".")) if below else ""


def resolve_slices(path: str) -> str:
    """Replace an index into a slice of a list, such as ``layers[1:]``, by the index into the list.

    torch.export names such a module ``layers.slice(1, None, None).0``, which becomes ``layers.1``.
    """
    # The start and the step of the slice, and the index into it.
    pattern = r"slice\((None|\d+), (?:None|-?\d+), (None|\d+)\)\.(\d+)"

    def index_into_list(match: re.Match[str]) -> str:
        start, step, index = (
            default if text == "None" else int(text)
            for text, default in zip(match.groups(), (0, 1, 0), strict=True)
        )
        return str(start + index * step)

    return re.sub(pattern, index_into_list, path)


class Line(NamedTuple):
    """A line of code that was running, and the name of its function."""

    file: str
    number: int | None
    function: str
    code: str


def source_line(node: fx.Node) -> str:
    """Return the user's line that a node came from: ``file:line (`code`)``."""
    frames = re.findall(r'File "(.+?)", line (\d+), in (.*)\n\s*(.*)', node.stack_trace or "")
    lines = (Line(file, int(number), *rest) for file, number, *rest in reversed(frames))
    return user_line(lines)


def running_line() -> str:
    """Return the user's line that runs now."""
    return user_line(running_lines(sys._getframe(1)))


def running_lines(frame: FrameType | None) -> Iterator[Line]:
    """Iterate over the lines that run now, the innermost first."""
    while frame is not None:
        code = frame.f_code
        text = linecache.getline(code.co_filename, frame.f_lineno)
        yield Line(code.co_filename, frame.f_lineno, code.co_name, text)
        frame = frame.f_back


def user_line(lines: Iterable[Line]) -> str:
    """Return the innermost of the user's lines, and the line of ``forward`` that led there.

    Parameters
    ----------
    lines : iterable of Line
        The innermost first.
    """
    of_user = (line for line in lines if is_user_file(line.file))
    innermost = next(of_user, None)
    if innermost is None:
        return UNKNOWN_LINE
    own = format_line(innermost.file, innermost.number, innermost.code)
    if innermost.function == "forward":
        return own
    caller = next((line for line in of_user if line.function == "forward"), None)
    if caller is None:
        return own
    return f"{own}, called at {format_line(caller.file, caller.number, caller.code)}"


def format_line(file: str, line: int | None, code: str | None) -> str:
    """Return ``file:line (`code`)``, with long code cut."""
    text = " ".join((code or "").split())
    short = text if len(text) <= MAX_CODE_WIDTH else f"{text[: MAX_CODE_WIDTH - 4]} ..."
    return f"{file}:{line} (`{short}`)"


def is_user_file(file: str) -> bool:
    """Return True if a source file is the user's, and not part of torch, fxshap or Python."""
    path, stdlib = Path(file), Path(sysconfig.get_path("stdlib"))
    libraries = [Path(torch.__file__).parent, Path(__file__).parents[1]]
    installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    in_python = file.startswith("<") or (path.is_relative_to(stdlib) and not installed)
    return not in_python and not any(path.is_relative_to(folder) for folder in libraries)


#: The entries of ``meta`` that tell where in the user's model a node came from.
PROVENANCE_KEYS = ("nn_module_stack", "stack_trace")


def provenance_of(node: fx.Node) -> dict[str, Any]:
    """Return the entries of ``meta`` that tell where in the user's model a node came from."""
    return {key: node.meta[key] for key in PROVENANCE_KEYS if key in node.meta}


def describe_location(node: fx.Node) -> str:
    """Name a node and the user's module and line that it came from, for messages."""
    module, line = user_module(node), source_line(node)
    location = f"{node.name} in {module}" if module else node.name
    return location if line == UNKNOWN_LINE else f"{location}, {line.partition(' (')[0]}"
