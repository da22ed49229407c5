"""Progress bars for slow work, on a terminal or in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, TextIO

#: Seconds before the bar appears.
DELAY = 2.0
#: Seconds between updates of the bar.
INTERVAL = 0.5

#: Called when a step of the work begins.
Step = Callable[[], None]


@dataclass
class Progress:
    """What is done, how many steps it has, and how many of them have begun."""

    what: str
    steps: int = 0
    taken: int = 0

    def step(self) -> None:
        """Begin the next step."""
        self.taken += 1


@contextmanager
def progress_bar(what: str, show: bool = True, steps: int = 0) -> Iterator[Step]:
    """Show a progress bar on a terminal or in a notebook while slow work is done.

    The bar disappears when the work is done.

    Parameters
    ----------
    what : str
        Describes the work.
    show : bool
        Whether to show the bar.
    steps : int
        How many steps the work has. Without steps only the time is shown.
    """
    progress = Progress(what, steps)
    if not show or not is_interactive(sys.stderr):
        yield progress.step
        return
    done = Event()
    thread = Thread(target=show_progress, args=(progress, sys.stderr, done), daemon=True)
    thread.start()
    try:
        yield progress.step
    finally:
        done.set()
        thread.join()


def show_progress(progress: Progress, stream: TextIO, done: Event) -> None:
    """Update the bar until the work is done. The work itself cannot: a capture is one call."""
    if done.wait(DELAY):
        return
    from tqdm.auto import tqdm

    form = None if progress.steps else "{desc}: {elapsed}"
    total = progress.steps or None
    with tqdm(
        desc=progress.what, total=total, leave=False, bar_format=form, file=stream, unit="pass"
    ) as bar:
        while not done.wait(INTERVAL):
            bar.n = progress.taken
            bar.refresh()


def samples_bar(total: int, show: bool, **options: Any) -> Any:
    """Return a bar of samples, which is updated by the work itself.

    Parameters
    ----------
    total : int
    show : bool
        Whether to show the bar, on a terminal or in a notebook.
    **options
        Other options of ``tqdm``.
    """
    from tqdm.auto import tqdm

    silent = not (show and is_interactive(sys.stderr))
    return tqdm(total=total, unit="samples", disable=silent, **options)


def is_interactive(stream: TextIO | None) -> bool:
    """Return True if a stream is a terminal or a notebook."""
    return stream is not None and (stream.isatty() or "ipykernel" in sys.modules)
