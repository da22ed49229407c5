"""A progress line on the terminal for slow work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import TextIO

#: Seconds before the line appears.
DELAY = 2.0
#: Seconds between updates of the line.
INTERVAL = 0.5


#: Called when a step of the work begins.
Step = Callable[[], None]


@dataclass
class ProgressLine:
    """The text of the line: what is done, how many steps of it have begun, and the time."""

    what: str
    steps: int = 0
    taken: int = 0

    def step(self) -> None:
        """Begin the next step."""
        self.taken += 1

    def text(self, seconds: float) -> str:
        """Return the line."""
        progress = f", {self.taken} of {self.steps}" if self.steps else ""
        return f"{self.what}{progress}: {seconds:.1f} s"


@contextmanager
def progress_line(what: str, show: bool = True, steps: int = 0) -> Iterator[Step]:
    """Show a progress line on a terminal or in a notebook while slow work is done.

    Parameters
    ----------
    what : str
        Describes the work.
    show : bool
        Whether to show the line.
    steps : int
        How many steps the work has. The line of work with steps, which is repeated for every
        sample, is erased at the end.
    """
    stream, line = sys.stderr, ProgressLine(what, steps)
    if not show or not is_interactive(stream):
        yield line.step
        return
    done = Event()
    thread = Thread(target=show_progress, args=(line, stream, done), daemon=True)
    thread.start()
    try:
        yield line.step
    finally:
        done.set()
        thread.join()


def show_progress(line: ProgressLine, stream: TextIO, done: Event) -> None:
    """Update the line until the work is done."""
    start = time.perf_counter()
    if done.wait(DELAY):
        return
    while True:
        text = line.text(time.perf_counter() - start)
        stream.write(f"\r{text}")
        stream.flush()
        if done.wait(INTERVAL):
            break
    last = line.text(time.perf_counter() - start)
    stream.write(f"\r{' ' * len(last)}\r" if line.steps else f"\r{last}\n")
    stream.flush()


def is_interactive(stream: TextIO | None) -> bool:
    """Return True if a stream is a terminal or a notebook."""
    return stream is not None and (stream.isatty() or "ipykernel" in sys.modules)
