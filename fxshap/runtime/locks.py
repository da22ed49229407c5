"""Locks: one thread captures or explains at a time, in the whole process.

A backward pass writes its two endpoints where the recorded graph reads them. torch.export affects
all threads: while it traces, it replaces ``nn.Module.__call__`` and puts other tensors into the
modules that it traces. So ordinary calls of a model run concurrently, but not during a capture.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, RLock, get_ident


class _LockState:
    """The locks, and the threads that hold them."""

    def __init__(self) -> None:
        self.explaining = RLock()
        self.changed = Condition()
        self.calling: Counter[int] = Counter()  # ordinary calls of each thread
        self.capturing: int | None = None  # the thread that captures


_state = [_LockState()]


@contextmanager
def explanation_lock() -> Iterator[None]:
    """Let no other thread explain; the same thread may enter again."""
    with _state[-1].explaining:
        yield


@contextmanager
def capture_lock() -> Iterator[None]:
    """Block new ordinary calls of other threads, and wait for those that are running.

    The thread must hold the explanation lock.
    """
    state, me = _state[-1], get_ident()
    try:
        with state.changed:
            state.capturing = me
            state.changed.wait_for(lambda: not set(state.calling) - {me})
        yield
    finally:
        with state.changed:
            state.capturing = None
            state.changed.notify_all()


@contextmanager
def model_call() -> Iterator[None]:
    """Wait while another thread captures; the explanation lock must not be taken inside."""
    state, me = _state[-1], get_ident()
    with state.changed:
        state.changed.wait_for(lambda: me in state.calling or state.capturing in (None, me))
        state.calling[me] += 1
    try:
        yield
    finally:
        with state.changed:
            state.calling[me] -= 1
            state.calling += Counter()  # drops zero counts
            state.changed.notify_all()


def reset_after_fork() -> None:
    """Reset the locks after fork: the parent's threads never release them in the child."""
    _state[:] = [_LockState()]


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=reset_after_fork)
