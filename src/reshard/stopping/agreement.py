"""One rank's side of the agreement on a last step: between the thread that trains and the one that watches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from reshard.comm.communicator import Board
from reshard.errors import CommunicationError, NoAgreementError
from reshard.stopping.chair import Chair
from reshard.stopping.limits import Limits
from reshard.stopping.notices import Decision, Notices, Wish


class Agreement:
    """What one rank knows, and what it has promised.

    The thread that trains only calls `step_done`; it touches no store, and waits only when the run is to stop. Another thread calls `look`
    again and again.

    Args:
        board: the job's.
        rank: this rank.
        limits: how long ranks wait for each other.
        clock: seconds.

    Raises:
        CommunicationError: the board can't be reached.
    """

    def __init__(self, board: Board, rank: int, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._notices = Notices(board, rank)
        self._rank = rank
        self._limits = limits
        self._clock = clock
        self._chair = Chair(self._notices, limits) if rank == 0 else None
        self._turn = threading.Condition()
        self._wish: Wish | None = None
        self._since = self._urgent_since = 0.0
        # The step in which this rank is: the last of which it was told that it is done, and one.
        self._entered: int | None = None
        self._pledged: int | None = None
        self._arrived: int | None = None
        self._decision: Decision | None = None
        self._told: set[object] = set()
        self._lost: CommunicationError | None = None

    @property
    def wish(self) -> Wish | None:
        """The wish that this rank has heard of; an urgent one comes before others."""
        return self._wish

    @property
    def decision(self) -> Decision | None:
        """What this rank knows to be decided."""
        return self._decision

    def want(self, wish: Wish) -> None:
        """This rank wants the run to stop. From any thread; the others hear of it at the next `look`."""
        with self._turn:
            before = self._wish
            if before is None:
                self._since = self._clock()
            if wish.urgent and (before is None or not before.urgent):
                self._urgent_since = self._clock()
            if before is None or (wish.urgent and not before.urgent):
                self._wish = wish
            if self._lost is not None and self._decision is None:
                self._decide(Decision("failed", details=f"the other ranks can't be told: {self._lost.what}"))

    def step_done(self, step: int) -> bool:
        """Whether to stop here: the same on every rank. Waits for the others when the run is to stop.

        Raises:
            NoAgreementError: it was to stop, and the ranks did not agree.
        """
        with self._turn:
            if self._wish is None or self._is_over():
                self._entered = step + 1
                return False
            if self._pledged is None:
                self._pledged = step
            if step >= self._pledged:
                self._turn.wait_for(lambda: self._decision is not None)
            decision = self._decision
            if decision is not None and decision.verdict == "target" and step >= decision.step:
                self._arrived = step
                self._turn.wait_for(lambda: self._decision is not None and self._decision.is_final)
            self._entered = step + 1
            return self._is_stop()

    def look(self) -> None:
        """Tell the others what is new, and hear what they say. One thread calls it.

        Raises:
            CommunicationError: the board can't be reached.
        """
        self._hear_of_wishes()
        with self._turn:
            wish = self._wish
            if wish is None or (self._decision is not None and self._decision.is_final):
                return
            if self._pledged is None:
                self._pledged = self._entered
            pledged, arrived = self._pledged, self._arrived
        self._tell(wish, lambda: self._notices.wish(wish))
        if pledged is not None:
            self._tell("pledge", lambda: self._notices.pledge(pledged))
        if arrived is not None:
            self._tell("arrival", lambda: self._notices.arrive(arrived))
        decision = self._ask()
        if decision is not None and decision != self._decision:
            with self._turn:
                self._decide(decision)

    def give_up(self, error: CommunicationError) -> None:
        """The board can't be reached any more: this rank can't agree with the others on anything."""
        with self._turn:
            self._lost = error
            if self._wish is not None and (self._decision is None or not self._decision.is_final):
                self._decide(Decision("failed", details=f"the other ranks can't be reached: {error.what}"))

    def leave(self) -> None:
        """This rank is through with its loop. The others must not wait for it."""
        with self._turn:
            if self._decision is not None and self._decision.is_final:
                return
            self._decide(Decision("over"))
        with suppress(CommunicationError):
            self._notices.leave()
            if self._rank == 0:
                self._notices.decide(Decision("over", details="rank 0 has come to the end of its loop"))

    def _hear_of_wishes(self) -> None:
        if self._wish is None or not self._wish.urgent:
            heard = self._notices.read_wish(urgent=True)
            if heard is None and self._wish is None:
                heard = self._notices.read_wish(urgent=False)
            if heard is not None:
                self._told.add(heard)
                self.want(heard)

    def _tell(self, what: object, post: Callable[[], None]) -> None:
        if what not in self._told:
            post()
            self._told.add(what)

    def _ask(self) -> Decision | None:
        assert self._wish is not None
        now = self._clock()
        urgent = self._wish.urgent
        if self._chair is not None:
            made = self._chair.look(now - self._since, now - self._urgent_since if urgent else None)
            if made is not None:
                self._notices.decide(made)
            return made
        heard = self._notices.decision()
        limit = self._limits.for_rank_0(urgent=urgent)
        if (heard is None or not heard.is_final) and now - (self._urgent_since if urgent else self._since) > limit:
            return Decision("failed", details=f"rank 0 decided nothing within {limit:g} s")
        return heard

    def _decide(self, decision: Decision) -> None:
        self._decision = decision
        self._turn.notify_all()

    def _is_over(self) -> bool:
        return self._decision is not None and self._decision.verdict == "over"

    def _is_stop(self) -> bool:
        decision, wish = self._decision, self._wish
        if decision is None or decision.verdict in ("target", "over"):
            return False
        if decision.verdict == "stop":
            return True
        assert wish is not None
        raise NoAgreementError(
            f"the run was to stop ({wish.reason}), and its ranks did not agree on a last step",
            rank=self._rank,
            found=decision.details,
            fix="nothing more is saved; resume from what is committed",
        )
