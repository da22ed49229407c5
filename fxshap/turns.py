"""Threads take turns: one of them captures or walks at a time, in the whole process.

torch.export changes ``nn.Module`` for all threads while it traces, and a walk writes its two ends
where the recorded graph reads them. Ordinary calls of a model wait for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

_locks = [RLock()]


@contextmanager
def taking_turns() -> Iterator[None]:
    """Let no other thread in; the same thread may enter again."""
    with _locks[-1]:
        yield


def renew() -> None:
    """Forget who is in: the thread of a parent process does not leave in its child."""
    _locks[:] = [RLock()]


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=renew)
