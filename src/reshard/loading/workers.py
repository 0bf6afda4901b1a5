"""Several threads that take pieces of work from one supply, the caller's among them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from reshard.cores import cores_per_rank

T = TypeVar("T")

# Reads in flight per rank, at most: a local disk or a parallel file system wants several.
_MOST_READERS = 4


def count_readers() -> int:
    """Reads in flight of this rank: more than the cores that copy is no use on any storage, and ranks that share cores take them from each
    other.
    """
    return max(1, min(_MOST_READERS, int(cores_per_rank())))


def run_all(works: Iterator[Callable[[], T]], threads: int, name: str) -> list[T]:
    """Do all pieces of work, each thread taking the next one when it is done with one.

    No piece is handed over: to wake a thread for each costs, where pieces are small, more than they do. What makes the pieces runs in turn
    on the threads that take them.

    Args:
        works: the pieces; asked for by one thread at a time.
        threads: how many, the caller's own included.
        name: of the others.

    Returns:
        The results, in no order.

    Raises:
        BaseException: the first that a piece, or what makes the pieces, raised. Then no further piece is begun, and those under way have
            ended.
    """
    crew = _Crew(works)
    helpers = [threading.Thread(target=crew.serve, name=name, daemon=True) for _ in range(threads - 1)]
    try:
        # Where the system gives no further thread, those that there are do all.
        with suppress(RuntimeError):
            for helper in helpers:
                helper.start()
        crew.serve()
    finally:
        crew.stop()
        _join([helper for helper in helpers if helper.ident is not None])
    if crew.error is not None:
        raise crew.error
    return crew.results


def _join(threads: Sequence[threading.Thread]) -> None:
    """Wait for all, whatever comes in between: what they work on ends with the call."""
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        _join([thread for thread in threads if thread.is_alive()])
        raise


class _Crew(Generic[T]):
    def __init__(self, works: Iterator[Callable[[], T]]) -> None:
        self.results: list[T] = []
        self.error: BaseException | None = None
        self._works = works
        self._turn = threading.Lock()
        self._is_over = False

    def serve(self) -> None:
        """Take piece after piece, until there is none left or one has failed."""
        try:
            while (work := self._take()) is not None:
                self.results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self.error = self.error or error
            self.stop()

    def stop(self) -> None:
        """Begin no further piece."""
        self._is_over = True

    def _take(self) -> Callable[[], T] | None:
        with self._turn:
            return None if self._is_over else next(self._works, None)
