"""How far each rank has come with a save, for whoever wants to know: notices that nobody waits for."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from reshard.comm.communicator import Board
from reshard.errors import CommunicationError

_TOPIC = "save"

# A person who waits looks every few seconds; a store serves thousands of ranks.
_SECONDS_BETWEEN = 1.0


class RankProgress(msgspec.Struct, array_like=True, frozen=True):
    """What one rank does for a save.

    Attributes:
        rank: the rank.
        step: the iteration.
        phase: `copying` the state, `writing` its files, `committing` (it has written, and waits for the others and rank 0), `done` or
            `failed`.
        done: the bytes that it has written.
        total: of how many.
        since: when the save began on this rank; seconds since the epoch.
        seen: when it said so.
    """

    rank: int
    step: int
    phase: str
    done: int
    total: int
    since: float
    seen: float

    @property
    def is_over(self) -> bool:
        """Whether the rank is done with the save, well or not."""
        return self.phase in ("done", "failed")

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.phase}, {self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB, for {self.seen - self.since:.1f} s"


@dataclass(frozen=True)
class SaveStatus:
    """How far the ranks have come with the newest save.

    A rank says nothing of an asynchronous save before its thread begins: where ranks share cores that may be a second after the call. Until
    then this shows what it said of the save before.

    Attributes:
        ranks: what each last said, at most a second ago; None of a rank that has saved nothing yet.
    """

    ranks: tuple[RankProgress | None, ...]

    @property
    def step(self) -> int | None:
        """The newest iteration that any rank is at, or was."""
        return max((rank.step for rank in self.ranks if rank is not None), default=None)

    @property
    def is_busy(self) -> bool:
        """Whether any rank is still at it."""
        return any(rank is not None and not rank.is_over for rank in self.ranks)

    @property
    def behind(self) -> int | None:
        """The rank that the others wait for: the one that has least of its part done; None when nobody waits."""
        step = self.step
        if step is None or not self.is_busy:
            return None
        return min(range(len(self.ranks)), key=lambda rank: (self._share(rank, step), rank))

    def _share(self, rank: int, step: int) -> float:
        said = self.ranks[rank]
        if said is None or said.step < step:
            return -1.0
        if said.phase in ("copying", "writing"):
            return said.done / max(1, said.total)
        return 2.0 if said.is_over else 1.0

    def __str__(self) -> str:
        if self.step is None:
            return "no rank has begun to save"
        lines = [f"iteration {self.step}" + (f"; the others wait for rank {self.behind}" if self.behind is not None else "")]
        lines += [f"rank {rank}: nothing yet" if said is None else str(said) for rank, said in enumerate(self.ranks)]
        return "\n  ".join(lines)


class ProgressNotices:
    """One rank's notices.

    Args:
        board: where they are left.
        rank: whose they are.
    """

    def __init__(self, board: Board, rank: int) -> None:
        self._board = board
        self._rank = rank
        self._step = 0
        self._phase = ""
        self._done = self._total = 0
        self._since = self._posted = 0.0

    def turn_to(self, step: int) -> None:
        """What is noted from now on is of this iteration. Leaves no notice: a save may fail before there is anything to do."""
        if self._phase != "copying":
            self._step, self._done, self._total, self._since = step, 0, 0, time.time()

    def begin(self, step: int, total: int, phase: str = "copying") -> None:
        """A save begins, or a part of it of which it is known how much there is to do."""
        if self._phase != "copying":
            self._since = time.time()
        self._step, self._done, self._total = step, 0, total
        self.enter(phase)

    def enter(self, phase: str) -> None:
        """What this rank does from now on."""
        self._phase = phase
        self._post()

    def written(self, nbytes: int) -> None:
        """So many bytes more are written."""
        self._done += nbytes
        if time.time() - self._posted >= _SECONDS_BETWEEN:
            self._post()

    def _post(self) -> None:
        self._posted = time.time()
        said = RankProgress(self._rank, self._step, self._phase, self._done, self._total, self._since, self._posted)
        with suppress(CommunicationError):  # a notice is no reason for a save to fail
            self._board.post(_TOPIC, msgspec.msgpack.encode(said))


def read_status(board: Board, world_size: int) -> SaveStatus:
    """What all ranks last said.

    Raises:
        CommunicationError: the notices can't be reached.
    """
    said = board.read_all(_TOPIC, world_size)
    return SaveStatus(tuple(None if data is None else msgspec.msgpack.decode(data, type=RankProgress) for data in said))
