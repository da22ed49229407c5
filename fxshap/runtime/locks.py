"""Threads take turns: one of them captures or walks at a time, in the whole process.

A walk writes its two ends where the recorded graph reads them. torch.export is harder on others:
while it traces, it replaces ``nn.Module.__call__`` and puts other tensors into the modules that it
traces, for every thread. So ordinary calls of a model run side by side, but not beside a capture.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, RLock, get_ident


class _LockState:
    """Who is in."""

    def __init__(self) -> None:
        self.walking = RLock()
        self.changed = Condition()
        self.calling: Counter[int] = Counter()  # ordinary calls of each thread
        self.capturing: int | None = None  # the thread that captures


_turns = [_LockState()]


@contextmanager
def explanation_lock() -> Iterator[None]:
    """Let no other thread explain; the same thread may enter again."""
    with _turns[-1].walking:
        yield


@contextmanager
def capture_lock() -> Iterator[None]:
    """Let no ordinary call of another thread in, and wait for those that are; within a turn."""
    turns, me = _turns[-1], get_ident()
    with turns.changed:
        turns.capturing = me
        turns.changed.wait_for(lambda: not set(turns.calling) - {me})
    try:
        yield
    finally:
        with turns.changed:
            turns.capturing = None
            turns.changed.notify_all()


@contextmanager
def model_call() -> Iterator[None]:
    """Wait while another thread captures; never enter a turn from within."""
    turns, me = _turns[-1], get_ident()
    with turns.changed:
        turns.changed.wait_for(lambda: me in turns.calling or turns.capturing in (None, me))
        turns.calling[me] += 1
    try:
        yield
    finally:
        with turns.changed:
            turns.calling[me] -= 1
            turns.calling += Counter()  # without those that have none left
            turns.changed.notify_all()


def reset_after_fork() -> None:
    """Forget who is in: the thread of a parent process does not leave in its child."""
    _turns[:] = [_LockState()]


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=reset_after_fork)
