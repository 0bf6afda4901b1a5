"""What ranks tell each other about the end of a run, on the job's board: nobody waits in a collective for it."""

from __future__ import annotations

from typing import Literal

import msgspec

from reshard.comm.communicator import Board

_OPENED = "stop/opened"


class Wish(msgspec.Struct, array_like=True, frozen=True):
    """Somebody wants the run to stop.

    Attributes:
        reason: why, for people: `SIGTERM`, `time limit`.
        urgent: the process may be killed soon, so that the time limit counts.
    """

    reason: str
    urgent: bool


class _Step(msgspec.Struct, array_like=True, frozen=True):
    """A step, or None: the rank has left its loop."""

    step: int | None


class Decision(msgspec.Struct, array_like=True, frozen=True):
    """What rank 0 has decided.

    Attributes:
        verdict: `target`: run to this step, and wait there. `stop`: every rank waits there: stop now. `failed`: there is no step at which
            all can stop. `over`: a rank has come to the end of its loop by itself: nobody needs to stop.
        step: the step, of the first two.
        details: what was wrong.
    """

    verdict: Literal["target", "stop", "failed", "over"]
    step: int = 0
    details: str = ""

    @property
    def is_final(self) -> bool:
        """Whether nothing comes after it."""
        return self.verdict != "target"


class Notices:
    """One rank's view of the board.

    Args:
        board: the job's.
        rank: this rank.
    """

    def __init__(self, board: Board, rank: int) -> None:
        self._board = board
        self._rank = rank
        # Notices of an earlier loop of this job are still there. Every rank counts by itself; all have entered equally many.
        before = board.read(_OPENED, rank)
        number = 0 if before is None else int(before)
        board.post(_OPENED, str(number + 1).encode())
        self._topic = f"stop/{number}"

    def wish(self, wish: Wish) -> None:
        """Let all ranks know of a wish."""
        self._board.post(self._wish_topic(urgent=wish.urgent), msgspec.msgpack.encode(wish), shared=True)

    def read_wish(self, *, urgent: bool) -> Wish | None:
        """Any rank's last wish of a kind."""
        data = self._board.read(self._wish_topic(urgent=urgent), None)
        return None if data is None else msgspec.msgpack.decode(data, type=Wish)

    def pledge(self, step: int) -> None:
        """This rank goes no further than this step before it has heard a decision."""
        self._post("pledge", _Step(step))

    def arrive(self, step: int) -> None:
        """This rank has done this step, and stands still."""
        self._post("arrival", _Step(step))

    def leave(self) -> None:
        """This rank is through with its loop: it will neither pledge nor arrive."""
        self._post("pledge", _Step(None))
        self._post("arrival", _Step(None))

    def decide(self, decision: Decision) -> None:
        """What rank 0 has decided."""
        self._post("decision", decision)

    def decision(self) -> Decision | None:
        """What rank 0 has decided last."""
        data = self._board.read(f"{self._topic}/decision", 0)
        return None if data is None else msgspec.msgpack.decode(data, type=Decision)

    def collect(self, kind: Literal["pledge", "arrival"], missing: set[int], known: dict[int, int]) -> int | None:
        """Read the notices that are still missing.

        Args:
            kind: which.
            missing: the ranks to look at; those that have said something are taken out.
            known: what they said is put in here.

        Returns:
            A rank that has left its loop, if there is one.
        """
        for rank in sorted(missing):
            data = self._board.read(f"{self._topic}/{kind}", rank)
            if data is None:
                continue
            step = msgspec.msgpack.decode(data, type=_Step).step
            if step is None:
                return rank
            known[rank] = step
            missing.discard(rank)
        return None

    def _wish_topic(self, *, urgent: bool) -> str:
        return f"{self._topic}/{'urgent' if urgent else 'wish'}"

    def _post(self, kind: str, said: msgspec.Struct) -> None:
        self._board.post(f"{self._topic}/{kind}", msgspec.msgpack.encode(said))
