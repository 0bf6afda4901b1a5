"""A run that is told to stop saves once more and ends: what a training loop holds for that."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from types import TracebackType

from reshard.comm import Communicator
from reshard.errors import CommunicationError, UsageError
from reshard.frameworks.select import default_communicator
from reshard.stopping.agreement import Agreement
from reshard.stopping.limits import Limits
from reshard.stopping.notices import Wish
from reshard.stopping.signals import SignalPipe

_logger = logging.getLogger("reshard")

DEFAULT_TIMEOUT = 15.0
"""Seconds for the agreement: torchrun kills 30 s after its SIGTERM, and the save needs time too."""

# A rank that got a signal, and couldn't agree with the others, has so many seconds to end by itself: time for a save in the background.
# One that is stuck (a collective that nobody will join) is ended then, as the signal would have done at once.
_LAST_SECONDS = 5.0


class GracefulStop:
    """Stops a run after the same step on every rank: on a signal, after a time, or when somebody asks.

    Every rank makes one (collective), enters it in its main thread before its loop, and calls `should_stop` after each step. Where that
    says yes it does so on all ranks for the same step: save, and leave the loop. Between ranks all goes through the job's store, from a
    thread of its own; no collective is involved, and training waits for nothing until the run is to stop.

    A signal at any rank counts for all. It is caught also while the main thread waits for another rank. A rank that has got one, and finds
    no agreement with the others within the time limit, must end: `should_stop` raises, and if the process is still there 5 seconds later,
    it ends itself with 128 and the signal's number.

    Args:
        communicator: how the ranks talk; chosen by the framework that is in use when it isn't given.
        after_minutes: stop so long after this object was entered; rank 0's clock counts.
        timeout: seconds after a signal in which the ranks must have come to the same step; at least ten less than the launcher leaves them.
        signals: what stops the run.

    Raises:
        UsageError: an argument that can't be.
    """

    def __init__(
        self,
        communicator: Communicator | None = None,
        *,
        after_minutes: float | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        signals: Sequence[signal.Signals] = (signal.SIGTERM,),
    ) -> None:
        for field, value in (("after_minutes", after_minutes), ("timeout", timeout)):
            if value is not None and not value > 0:
                raise UsageError("a time must be positive", field=field, found=value)
        self._owns_communicator = communicator is None
        self._comm = communicator if communicator is not None else default_communicator()
        self._after = None if after_minutes is None else 60 * after_minutes
        self._limits = Limits(timeout, self._comm.world_size)
        self._signals = tuple(signals)
        self._taking = threading.Lock()
        self._got: signal.Signals | None = None
        self._agreement: Agreement | None = None
        self._pipe: SignalPipe | None = None
        self._watcher: threading.Thread | None = None
        self._leaving = threading.Event()

    @property
    def reason(self) -> str | None:
        """Why the run is to stop, as far as this rank knows; None while nobody wants it."""
        wish = None if self._agreement is None else self._agreement.wish
        return None if wish is None else wish.reason

    def request(self, reason: str, *, urgent: bool = False) -> None:
        """Ask for the run to stop, on whatever rank and from any thread.

        Args:
            reason: why, in a few words.
            urgent: the process may be killed soon. Otherwise the ranks wait for each other as long as a step takes.
        """
        self._entered().want(Wish(reason, urgent))
        if self._pipe is not None:
            self._pipe.wake()

    def should_stop(self, step: int) -> bool:
        """Whether this step, which is done, is the last one: the same on every rank.

        Args:
            step: its number; each is higher than the one before, and ranks count alike.

        Raises:
            NoAgreementError: the run was to stop, and the ranks did not agree in time. Nothing may be saved; leave.
        """
        agreement = self._entered()
        for number in set() if self._pipe is None else set(self._pipe.handled):
            self._take(number, agreement)
        return agreement.step_done(step)

    def __enter__(self) -> GracefulStop:
        if self._agreement is not None:
            raise UsageError("this object was entered before", fix="make another one")
        self._pipe = SignalPipe(self._signals)
        self._agreement = Agreement(self._comm.board(), self._comm.rank, self._limits)
        self._watcher = threading.Thread(target=self._watch, args=(self._agreement, self._pipe), name="reshard-stop", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._pipe is not None
        assert self._watcher is not None
        self._leaving.set()
        self._pipe.wake()
        # It never waits for another rank, but the store may be slow to say that it is gone.
        self._watcher.join()
        self._entered().leave()
        self._pipe.close()
        self._pipe = None
        if self._owns_communicator:
            self._comm.close()

    def _entered(self) -> Agreement:
        if self._agreement is None:
            raise UsageError("this object isn't entered yet", fix="use it in a `with` statement")
        return self._agreement

    def _take(self, number: signal.Signals, agreement: Agreement) -> None:
        with self._taking:
            if self._got is not None:
                return
            self._got = number
        _logger.warning("rank %d got %s: the run will stop", self._comm.rank, number.name)
        agreement.want(Wish(number.name, urgent=True))

    def _watch(self, agreement: Agreement, pipe: SignalPipe) -> None:
        started = time.monotonic()
        is_lost = False
        while not self._leaving.is_set():
            wish, decision = agreement.wish, agreement.decision
            is_busy = wish is not None and not (decision is not None and decision.is_final)
            came = pipe.wait(self._limits.interval(busy=is_busy))
            for number in came:
                self._take(number, agreement)
            if self._comm.rank == 0 and self._after is not None and wish is None and time.monotonic() - started >= self._after:
                agreement.want(Wish("time limit", urgent=False))
            if not is_lost:
                is_lost = not _looked(agreement)
            decision = agreement.decision
            if self._got is not None and decision is not None and decision.verdict == "failed":
                _end_soon(self._got, decision.details)
                return


def _looked(agreement: Agreement) -> bool:
    """Look at the board; False when that can't be done any more."""
    try:
        agreement.look()
    except CommunicationError as error:
        agreement.give_up(error)
        return False
    except Exception as error:
        # Training may wait for this thread.
        agreement.give_up(CommunicationError(f"{type(error).__name__}: {error}"))
        raise
    return True


def _end_soon(number: signal.Signals, details: str) -> None:
    def end() -> None:
        _logger.error("%s: no last save, since %s; this process doesn't come to its end and is ended", number.name, details)
        os._exit(128 + number)

    timer = threading.Timer(_LAST_SECONDS, end)
    timer.daemon = True
    timer.start()
