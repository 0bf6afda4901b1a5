"""Work that goes on while training does: one piece at a time, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs one piece of work at a time beside its caller, and keeps what became of the last one until it is asked for.

    The thread is no daemon: a process that ends while something is under way finishes it first.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._result: T | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether work is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], T]) -> None:
        """Begin a piece of work. The one before must have been waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                self._result = work()
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                self._error = error

        self._result = None
        self._thread = threading.Thread(target=run, name=self._name)
        self._thread.start()

    def wait(self) -> T | None:
        """Return when nothing is under way, with the result of the last work; None when there was none yet.

        Raises:
            BaseException: what the work raised; once.
        """
        thread = self._thread
        if thread is not None:
            thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result
