"""Which rank is gone: collectives name an address at most, so every rank gives signs of life while it works together with others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from reshard.comm.communicator import Communicator
from reshard.comm.single import LocalBoard
from reshard.errors import CommunicationError, extended

_ALIVE = "alive"

# Who finds out leaves it here: others may hear of the loss only when the first ones have given up, and are silent themselves.
_GONE = "gone"

# Of an earlier failure is what is older (seconds).
_FRESH = 120.0

# Seconds between two signs. A rank that is busy gives them too: they come from a thread of its own.
_INTERVAL = 1.0

# The first sign comes after so long (seconds): most work is done before. Only who begins so shortly before another stops to look for signs
# seems to give none.
_FIRST = 0.5

# Who gives no sign for so long (seconds) is taken for gone.
_PATIENCE = 3 * _INTERVAL

# So much longer (seconds) a rank gives signs of life when its own work has failed.
_AFTERWARDS = 30.0


@contextmanager
def lost_ranks_named(comm: Communicator) -> Iterator[None]:
    """Work together with the other ranks; when they can't be reached, the error names those that give no sign of life.

    Not collective by itself, and for one piece of work of all ranks.

    Raises:
        CommunicationError: the work's own, with a line `gone`.
    """
    if comm.world_size == 1 or isinstance(comm.board(), LocalBoard):  # then they live and die together
        yield
        return
    beat = _Heartbeat(comm)
    try:
        yield
    except CommunicationError as error:
        words = beat.lost()
        beat.stop(_AFTERWARDS)
        raise extended(error, ("gone", words)) from error
    except BaseException:
        beat.stop(_AFTERWARDS)
        raise
    beat.stop(0.0)


class _Heartbeat:
    def __init__(self, comm: Communicator) -> None:
        self._board = comm.board()
        self._rank, self._world_size = comm.rank, comm.world_size
        self._ends = threading.Event()
        self._until: float | None = None
        # Where the system gives no thread (at the end of the process it may not), the others might take this rank for gone if one is
        # lost: no reason to let them wait for it here.
        with suppress(RuntimeError):
            threading.Thread(target=self._beat, name="reshard-heartbeat", daemon=True).start()

    def stop(self, afterwards: float) -> None:
        """Give no more signs after so many seconds."""
        self._until = time.monotonic() + afterwards
        if not afterwards:
            self._ends.set()

    def lost(self) -> str:
        """The ranks that give no sign, in words. Takes some seconds."""
        try:
            before = self._board.read_all(_ALIVE, self._world_size)
            known = self._told()
            if known is None:
                time.sleep(_PATIENCE)
                after = self._board.read_all(_ALIVE, self._world_size)
                known = self._told() or self._words([rank for rank in range(self._world_size) if after[rank] == before[rank]])
                self._board.post(_GONE, f"{time.time()} {known}".encode())
        except CommunicationError:
            return "the job's store, and who serves it: rank 0 or the launcher"
        return known

    def _words(self, silent: list[int]) -> str:
        silent = [rank for rank in silent if rank != self._rank]
        if not silent:
            return f"nobody: every rank gave a sign of life within {_PATIENCE:g} s"
        words = ", ".join(map(str, silent[:8])) + (", …" if len(silent) > 8 else "")
        return f"rank{'s' if len(silent) > 1 else ''} {words}: no sign of life for {_PATIENCE:g} s"

    def _told(self) -> str | None:
        """What another rank has found out already."""
        for said in self._board.read_all(_GONE, self._world_size):
            moment, _, words = (said or b"0 ").decode().partition(" ")
            if time.time() - float(moment) < _FRESH:
                return words
        return None

    def _beat(self) -> None:
        count = 0
        with suppress(CommunicationError):
            wait = _FIRST
            while not self._ends.wait(wait) and (self._until is None or time.monotonic() < self._until):
                count += 1
                self._board.post(_ALIVE, f"{time.time()} {count}".encode())
                wait = _INTERVAL
