"""An event that is sound after an interrupt, wherever one comes."""

from __future__ import annotations

from contextlib import suppress
from queue import Empty, SimpleQueue


class Latch:
    """Is set once and stays so; threads wait for that.

    An event of `threading` has a lock that Python code takes: an interrupt (Ctrl-C) in there leaves it taken, and the next thread that
    waits, or sets it, stands still for ever. Here no thread holds anything that another one needs, and a signal's handler may do with it
    what the thread is just doing.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: list[SimpleQueue[None]] = []

    @property
    def is_set(self) -> bool:
        """Whether it is."""
        return self._is_set

    def set(self) -> None:
        """Let all go who wait, and will."""
        self._is_set = True  # first: who comes too late to be woken looks at it after it has come
        for queue in list(self._waiting):
            queue.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Return when it is set, or so many seconds are over; whether it is."""
        if not self._is_set:
            queue: SimpleQueue[None] = SimpleQueue()
            self._waiting.append(queue)
            if not self._is_set:
                with suppress(Empty):
                    queue.get(timeout=timeout)
        return self._is_set
