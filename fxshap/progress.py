"""A line on the terminal for what takes long, for those who wait."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TextIO

#: Seconds that nobody needs to be told about.
PATIENCE = 2.0
#: Seconds between one state of the line and the next.
STEP = 0.5


@contextmanager
def telling(what: str, show: bool = True) -> Iterator[None]:
    """Show what is going on and for how long, if it goes on for long and somebody looks.

    Parameters
    ----------
    what : str
    show : bool
        Whether to say anything at all.
    """
    stream = sys.stderr
    if not show or not is_watched(stream):
        yield
        return
    done = Event()
    teller = Thread(target=tell, args=(what, stream, done), daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def tell(what: str, stream: TextIO, done: Event) -> None:
    """Write the line again and again until it is done."""
    start = time.perf_counter()
    if done.wait(PATIENCE):
        return
    while True:
        stream.write(f"\r{what}: {time.perf_counter() - start:.1f} s")
        stream.flush()
        if done.wait(STEP):
            break
    stream.write(f"\r{what}: {time.perf_counter() - start:.1f} s\n")
    stream.flush()


def is_watched(stream: TextIO | None) -> bool:
    """Say whether a stream is a terminal or a notebook."""
    return stream is not None and (stream.isatty() or "ipykernel" in sys.modules)
