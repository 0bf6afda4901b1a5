"""Saves of which training waits only for the copy of its state."""

from __future__ import annotations

import logging
import operator
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, SupportsIndex

from reshard.comm import Communicator
from reshard.comm.together import attempt
from reshard.cores import cores_per_rank
from reshard.errors import CommunicationError, ReshardError, UsageError
from reshard.format.common import CommonInfo
from reshard.format.names import iteration_name
from reshard.frameworks.adapter import Adapter
from reshard.saving.background import Background
from reshard.saving.report import AsyncSave, SaveReport
from reshard.saving.saver import Saver
from reshard.saving.snapshot import Snapshot, SnapshotBuffers
from reshard.state import Kind, State
from reshard.storage.storage import join

# Where ranks share cores: for how many times as long as its rank's copying takes a save's thread stays back after a call. They are done
# within about so many: until then they want the cores. What a thread has begun there, however nice it is, keeps them waiting; and one that
# is so nice that it gets no turn may just have Python's lock. A rank that has cores of its own has one to spare for the thread, which then
# begins at once: deferred copies are made during the forward and backward pass, and the next step finds them done.
_PAUSE_COPIES = 4

# About the bytes that a core copies in a second: how long it will take to copy what was left for later.
_COPIED_PER_SECOND = 5e9

# The longest pause, in seconds: a small part of a save in which copying takes long enough for it.
_LONGEST_PAUSE = 1.0

_logger = logging.getLogger("reshard")


class AsyncSaver:
    """Takes snapshots, and has a saver write them in a thread of its own. At most one is under way.

    The saver's communicator is used by that thread only. What went wrong there is raised by the next call, on every rank.

    Args:
        saver: writes and commits.
        comm: another communicator over the same ranks, for the thread that calls.
        mode: how much is copied before a call returns.
    """

    def __init__(self, saver: Saver, comm: Communicator, mode: AsyncSave) -> None:
        self._saver = saver
        self._comm = comm
        self._mode: AsyncSave = mode
        self._background: Background[SaveReport] = Background("reshard-save")
        self._buffers: SnapshotBuffers | None = None
        self._snapshot: Snapshot | None = None
        self._unhook: Callable[[], None] | None = None
        self._updating: set[int] = set()  # threads that are in `before_update`

    def has_room(self) -> bool:
        """Whether another save can begin; waits for the one before, if that is what was chosen. The same on every rank; collective when
        saves may be skipped.

        Raises:
            ReshardError: the save before failed.
            UsageError: as `wait`.
        """
        self._check_thread()
        if self._saver.options.when_busy == "skip" and any(map(any, self._comm.all_gather(bytes([self._background.is_busy])))):
            return False
        self.wait()
        return True

    def save(
        self,
        step: SupportsIndex,
        adapter: Adapter | None,
        state: State,
        common: CommonInfo,
        error: ReshardError | None,
        metrics: Mapping[str, Any] | None,
        started: float,
        change: Callable[[State, bool], State] | None = None,
    ) -> SaveReport:
        """Copy a state, and begin to save it. `has_room` must have said that this can be.

        Args:
            step: as in `Saver.save`, and so are `state` to `metrics`.
            adapter: the state's; None when it couldn't be captured.
            state: see there.
            common: see there.
            error: see there.
            metrics: see there.
            started: when the call began (`time.perf_counter`), for the report.
            change: as in `Saver.save`; of the copy, in the background.
        """
        began = time.perf_counter()  # after the wait for the save before
        snapshot: Snapshot | None = None
        if error is None and adapter is not None:
            snapshot, error = attempt(lambda: self._take(adapter, state))
        pause = 0.0
        if cores_per_rank() < 1:
            copying = time.perf_counter() - began + (0 if snapshot is None else snapshot.later / _COPIED_PER_SECOND)
            pause = min(_PAUSE_COPIES * copying, _LONGEST_PAUSE)

        def work() -> SaveReport:
            problem = error
            if snapshot is not None:
                taken = snapshot
                if pause:
                    taken.wanted.wait(pause)
                attempt(lambda: self._saver.announce(step, taken.nbytes))
                _, failed = attempt(taken.finish)
                problem = problem if failed is None else failed
            try:
                return self._saver.save(step, State() if snapshot is None else snapshot.state, common, problem, metrics, change)
            except ReshardError as failed:
                # Now, too: the next call may be hours away, or never come.
                if self._comm.rank == 0 or isinstance(failed, CommunicationError):
                    _logger.error("an asynchronous save failed: %s", failed)  # noqa: TRY400 - whoever asks gets the stack
                raise

        try:
            self._snapshot = snapshot
            self._background.start(work)
        except RuntimeError:
            # From a handler at the process's exit. Nothing can go on after the call; but a save that was called for is made.
            if snapshot is not None:
                snapshot.wanted.set()
            return work()
        except BaseException:
            # An interrupt before it was begun: then nobody will copy what is left.
            if snapshot is not None and not self._background.is_busy:
                snapshot.abandon()
            raise
        number, _ = attempt(lambda: operator.index(step))
        directory = self._saver.root if number is None else join(self._saver.root, iteration_name(number))
        nbytes = 0 if snapshot is None else snapshot.nbytes
        return SaveReport(number or 0, directory, nbytes, time.perf_counter() - started, (), "under way")

    def before_update(self) -> None:
        """Return when what is being saved may be changed.

        Raises:
            UsageError: as `wait`.
        """
        snapshot = self._snapshot  # any thread may step an optimizer while another one waits for the save
        if snapshot is None or snapshot.is_copied:
            return
        self._check_thread()
        me = threading.get_ident()
        try:
            self._updating.add(me)
            snapshot.wait()
        finally:
            self._updating.discard(me)  # nothing before it that an interrupt can come between

    def wait(self) -> SaveReport | None:
        """Return when nothing is under way, with what became of the last save; None when there was none.

        Raises:
            ReshardError: the last save failed; once.
            UsageError: a signal's handler calls, of a thread that is in `before_update`.
        """
        self._check_thread()
        snapshot = self._snapshot
        if snapshot is not None:
            snapshot.give_back()  # interrupts may have kept this thread from it
            snapshot.wanted.set()
        try:
            return self._background.wait()
        finally:
            # An interrupt ends the waiting, not the copying.
            if not self._background.is_busy:
                self._snapshot = None

    def close(self) -> None:
        """Let go of the optimizers, and end the thread. Nothing may be under way.

        Raises:
            UsageError: as `wait`.
        """
        self._check_thread()
        self._background.close()
        if self._unhook is not None:
            self._unhook()
            self._unhook = None
        self._buffers = None

    def _check_thread(self) -> None:
        """See that it isn't a signal's handler that calls while its thread copies: it would wait for that for ever. And what another save
        left for later, the step after `before_update` would change.
        """
        if threading.get_ident() in self._updating:
            raise UsageError(
                "the handler of a signal uses the manager while its thread is about to change what is being saved",
                expected="a handler that only notes that it was called",
                fix="save, wait or close in the training loop, after a step; reshard.GracefulStop catches signals and says after which",
            )

    def _take(self, adapter: Adapter, state: State) -> Snapshot:
        if self._mode == "deferred" and self._unhook is None:
            self._unhook = adapter.before_steps(self.before_update)
            if self._unhook is None:
                _logger.info(
                    "%s has no place to wait before an optimizer's step: async_save copies before the call returns", adapter.framework
                )
        if self._buffers is None:
            self._buffers = SnapshotBuffers(adapter.host_buffer)
        saves_optimizer = self._saver.options.save_optimizer
        deferred = self._mode == "deferred" and self._unhook is not None
        return self._buffers.take(state, deferred=deferred, takes=None if saves_optimizer else lambda key: key.kind is not Kind.OPTIMIZER)
