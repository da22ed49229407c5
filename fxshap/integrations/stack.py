"""The Python frames of the calls that are running now."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType


def enclosing_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Iterate over a frame and its callers, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def frame_module(frame: FrameType) -> str:
    """Return the name of the module whose code a frame runs."""
    return str(frame.f_globals.get("__name__", ""))
