"""Work that goes on while training does: one piece at a time, in a thread of its own."""

from __future__ import annotations

import concurrent.futures
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")

# What a thread of a save is nicer by than its caller's, as much as the command `nice` makes a process: it has a tenth of a core that both
# want. Nobody waits for what it copies: who would, copies too (`Snapshot.wait`).
_NICER = 10


class Background(Generic[T]):
    """Runs one piece of work at a time beside its caller, and keeps what became of the last one until it is asked for.

    Where cores are busy, the caller's threads come first.

    Its thread is there from the begin and stays: whoever starts a thread waits until it has had its first turn, on busy cores as long as
    copying some of the state takes. And where no thread can be had, nothing was begun yet. A process that ends while something is under
    way finishes it first.

    Args:
        name: of the thread.

    Raises:
        RuntimeError: the system gives no thread.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_yield_to_training)
        self._executor.submit(int)
        self._work: Future[T] | None = None
        self._result: T | None = None

    @property
    def is_busy(self) -> bool:
        """Whether work is under way."""
        return self._work is not None and not self._work.done()

    def start(self, work: Callable[[], T]) -> None:
        """Begin a piece of work. The one before must have been waited for.

        Raises:
            RuntimeError: the process comes to its end, and runs nothing beside it any more.
        """
        assert self._work is None
        self._result = None
        self._work = self._executor.submit(work)

    def wait(self) -> T | None:
        """Return when nothing is under way, with the result of the last work; None when there was none yet.

        Raises:
            BaseException: what the work raised; once.
        """
        work = self._work
        if work is not None:
            concurrent.futures.wait([work])
            self._work = None
            self._result = work.result()
        return self._result

    def close(self) -> None:
        """End the thread, after what is under way."""
        self._executor.shutdown()


def _yield_to_training() -> None:
    """Let the threads of the process that trains go before the one that calls."""
    if sys.platform == "linux":  # elsewhere priorities are of processes only
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + _NICER)
