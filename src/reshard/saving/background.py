"""Work that goes on while training does: one piece at a time, in a thread of its own."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

from reshard.saving.latch import Latch

T = TypeVar("T")

# What a thread of a save is nicer by than its caller's, as much as the command `nice` makes a process: it has a tenth of a core that both
# want. Nobody waits for what it copies: who would, copies too (`Snapshot.wait`).
_NICER = 10


class _Piece(Generic[T]):
    """A piece of work, and what became of it. No `Future`, which takes locks in Python code: see `Latch`.

    Args:
        work: what is to be done.

    Attributes:
        over: set when nothing of it is still to be done.
        result: of the work, if it gave one.
        error: what it raised, if it did.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self.over = Latch()
        self.result: T | None = None
        self.error: BaseException | None = None
        self._work = work
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """Whether it is the caller's to run it, or to see that nobody does: the first one's who asks."""
        return self._claim.acquire(blocking=False)

    def run(self) -> None:
        """Do it, unless somebody saw that nobody does."""
        if not self.claim():
            return
        try:
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001 - who waits for it gets it
            self.error = error
        finally:
            self.over.set()


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
        self._piece: _Piece[T] | None = None
        self._result: T | None = None

    @property
    def is_busy(self) -> bool:
        """Whether work is under way."""
        return self._piece is not None and not self._piece.over.is_set

    def start(self, work: Callable[[], T]) -> None:
        """Begin a piece of work. The one before must have been waited for.

        After an interrupt in here `is_busy` says whether it was begun.

        Raises:
            RuntimeError: the process comes to its end, and runs nothing beside it any more.
        """
        assert self._piece is None
        self._result = None
        piece = self._piece = _Piece(work)  # noted before it can begin: who doesn't know of it doesn't wait for it
        try:
            self._executor.submit(piece.run)
        except BaseException:
            if piece.claim():
                self._piece = None
            raise

    def wait(self) -> T | None:
        """Return when nothing is under way, with the result of the last work; None when there was none yet.

        Raises:
            BaseException: what the work raised; once.
        """
        piece = self._piece
        if piece is not None:
            piece.over.wait()
            self._piece, self._result = None, piece.result
            error, piece.error = piece.error, None
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # its stack has this frame in it: nothing of it would go before the collector looks
        return self._result

    def close(self) -> None:
        """End the thread, after what is under way."""
        self._executor.shutdown()


def _yield_to_training() -> None:
    """Let the threads of the process that trains go before the one that calls."""
    if sys.platform == "linux":  # elsewhere priorities are of processes only
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + _NICER)
