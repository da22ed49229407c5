"""A line on the terminal for what takes long, for those who wait."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import TextIO

#: Seconds that nobody needs to be told about.
PATIENCE = 2.0
#: Seconds between one state of the line and the next.
STEP = 0.5


#: Called when one of the steps of a work begins.
Step = Callable[[], None]


@dataclass
class ProgressLine:
    """What is going on, and how far it is."""

    what: str
    steps: int = 0
    taken: int = 0

    def step(self) -> None:
        """Begin the next step."""
        self.taken += 1

    def text(self, seconds: float) -> str:
        """Return the line."""
        how_far = f", {self.taken} of {self.steps}" if self.steps else ""
        return f"{self.what}{how_far}: {seconds:.1f} s"


@contextmanager
def progress_line(what: str, show: bool = True, steps: int = 0) -> Iterator[Step]:
    """Show what is going on and for how long, if it goes on for long and somebody looks.

    Parameters
    ----------
    what : str
    show : bool
        Whether to say anything at all.
    steps : int
        How many steps it takes, for work that comes again and again: its line is wiped when it
        is done.
    """
    stream, line = sys.stderr, ProgressLine(what, steps)
    if not show or not is_interactive(stream):
        yield line.step
        return
    done = Event()
    teller = Thread(target=show_progress, args=(line, stream, done), daemon=True)
    teller.start()
    try:
        yield line.step
    finally:
        done.set()
        teller.join()


def show_progress(line: ProgressLine, stream: TextIO, done: Event) -> None:
    """Write the line again and again until it is done."""
    start = time.perf_counter()
    if done.wait(PATIENCE):
        return
    while True:
        text = line.text(time.perf_counter() - start)
        stream.write(f"\r{text}")
        stream.flush()
        if done.wait(STEP):
            break
    last = line.text(time.perf_counter() - start)
    stream.write(f"\r{' ' * len(last)}\r" if line.steps else f"\r{last}\n")
    stream.flush()


def is_interactive(stream: TextIO | None) -> bool:
    """Return True if a stream is a terminal or a notebook."""
    return stream is not None and (stream.isatty() or "ipykernel" in sys.modules)
