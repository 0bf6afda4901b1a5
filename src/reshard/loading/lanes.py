"""What one rank reads goes into its own memory and, in messages, into that of the others: the threads that do it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from reshard.comm import Communicator
from reshard.comm.together import attempt, unheard
from reshard.errors import CommunicationError, ReshardError
from reshard.loading.exchange import LANES, PreparedExchange
from reshard.loading.reader import read_plan
from reshard.loading.staged_check import StagedCheck
from reshard.loading.workers import count_readers
from reshard.planning.exchange_plan import Part
from reshard.planning.exchange_schedule import Incoming, Outgoing, Staged
from reshard.state import State, TensorKey
from reshard.storage import ReadableFile, Storage
from reshard.storage.storage import join

# The last byte of a message.
_DATA, _ABORT = 0, 1

_ALIGNMENT = 64


@dataclass(frozen=True)
class Traffic:
    """What a rank moved, in bytes.

    Attributes:
        read: of data files, gaps included.
        verified: of these, how many were held against digests.
        pages: of the whole pages on which lies what was copied out of mapped files.
        sent: to other ranks.
        received: from other ranks.
    """

    read: int = 0
    verified: int = 0
    pages: int = 0
    sent: int = 0
    received: int = 0


def run_exchange(
    prepared: PreparedExchange, state: State, comm: Communicator, storage: Storage, directory: str, *, verify: bool = True
) -> Traffic:
    """Fill the states of a job. Every rank that has a plan calls it.

    A rank that fails tells the others, which then return early, their memory partly filled: whoever calls this must let the ranks tell each
    other how it went. After a CommunicationError there is no such next step. However it ends, nothing is written afterwards.

    Args:
        prepared: this rank's part.
        state: the state whose description was planned.
        comm: the ranks; nothing else uses it meanwhile.
        storage: where the files lie.
        directory: the checkpoint.
        verify: whether row blocks are held against their digests.

    Raises:
        DamagedCheckpointError: a file is not what it promises, or its bytes are not as they were saved.
        StorageError: reading failed.
        CommunicationError: a rank is gone, or this one fell out of step with it.
    """
    return _Exchange(prepared, state, comm, storage, directory, StagedCheck(prepared, directory) if verify else None).run()


class _Stage:
    """What was read in an epoch: a buffer, and where each block begins in it."""

    def __init__(self, data: np.ndarray, places: list[int]) -> None:
        self.data = data
        self.places = places


class _Exchange:
    """The threads of one rank: one reads, and each lane has one that sends and one that receives.

    In an epoch, and in a lane, a rank sends to the ranks after it, one after the other, and receives from those before it in the same
    order of distance. So of all pairs that still have to meet, the one that is first in the order of (epoch, distance) finds both ends
    waiting for it, whatever a communicator buffers: no order of events leads into a deadlock.

    When this rank fails, or can't reach another, it goes on through the same order, but with the word that it broke off in the place of
    data: the others hear it where they wait for it, whether or not they have to do with the rank that failed first.
    """

    def __init__(
        self, prepared: PreparedExchange, state: State, comm: Communicator, storage: Storage, directory: str, check: StagedCheck | None
    ) -> None:
        self._prepared = prepared
        self._schedule = prepared.schedule
        self._tensors = state.tensors
        self._state = state
        self._comm = comm
        self._storage = storage
        self._directory = directory
        self._lanes = min(LANES, comm.world_size - 1)
        self._turn = threading.Condition()
        # Of each epoch that was read: the stage; None when it was sent, or when there is nothing to send but that this rank broke off.
        self._stages: list[_Stage | None] = []
        self._sent_epochs = [0] * self._lanes
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._error: ReshardError | None = None
        self._lost: CommunicationError | None = None
        self._is_broken = False
        self._is_over = False
        self._writing = 0
        self._check = check
        self._counts = Counter[str]()

    def run(self) -> Traffic:
        workers: list[Callable[[], None]] = [self._read]
        for lane in range(self._lanes):
            workers += [lambda lane=lane: self._send(lane), lambda lane=lane: self._receive(lane)]
        outcomes: SimpleQueue[BaseException | None] = SimpleQueue()

        def guarded(work: Callable[[], None]) -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                outcomes.put(error)
            else:
                outcomes.put(None)

        prepared = self._prepared
        try:
            with self._reaching("the other ranks"):
                for work in workers:
                    threading.Thread(target=guarded, args=(work,), name="reshard-exchange", daemon=True).start()
            if self._lost is not None:
                raise self._lost
            # Exact: bytes beside a run may be another rank's to read.
            amount, error = attempt(
                lambda: read_plan(
                    prepared.straight,
                    prepared.entries,
                    self._state,
                    self._storage,
                    self._directory,
                    gap_bytes=0,
                    memory_budget=prepared.straight_bytes,
                    verify=self._check is not None,
                )
            )
            if error is not None:
                self._break_off(error)
            if amount is not None:
                self._count("read", amount.read)
                self._count("verified", amount.verified)
            for _ in workers:
                # What a thread can't tell the other ranks ends the exchange here, and leaves the other threads behind.
                outcome = outcomes.get()
                if outcome is not None:
                    raise outcome
        finally:
            with self._turn:
                self._is_over = self._is_broken = True
                self._turn.notify_all()
                self._turn.wait_for(lambda: self._writing == 0)
        if self._lost is not None and self._error is not None:
            raise unheard(self._error, self._lost) from self._error
        error = self._lost or self._error
        if error is not None:
            raise error
        return Traffic(**self._counts)

    def _break_off(self, error: ReshardError | None) -> None:
        """Read and write nothing more, but tell everyone who waits for something; None: another rank did."""
        with self._turn:
            self._is_broken = True
            if self._error is None:
                self._error = error
            self._turn.notify_all()

    @contextmanager
    def _reaching(self, whom: str) -> Iterator[None]:
        """Whatever fails in here leaves this rank out of step with another; it breaks off, for the rest to hear."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - kept for the end
            if not isinstance(error, CommunicationError):
                found = f"{type(error).__name__}: {error}"
                lost = CommunicationError(f"a balanced load could not go on with {whom}", rank=self._comm.rank, found=found)
                lost.__cause__ = error
                error = lost
            with self._turn:
                self._lost = self._lost or error
            self._break_off(None)

    @contextmanager
    def _may_write(self) -> Iterator[bool]:
        """Whether this load may still write into memory; it doesn't end while someone is in here."""
        with self._turn:
            allowed = not self._is_broken
            self._writing += allowed
        try:
            yield allowed
        finally:
            with self._turn:
                self._writing -= allowed
                self._turn.notify_all()

    def _count(self, what: str, nbytes: int) -> None:
        with self._turn:
            self._counts[what] += nbytes

    def _read(self) -> None:
        """Stage after stage, at most one ahead of what is being sent."""
        with ThreadPoolExecutor(count_readers(), "reshard-read") as pool:
            for epoch, items in enumerate(self._schedule.epochs):
                with self._turn:
                    self._turn.wait_for(lambda epoch=epoch: self._is_over or min(self._sent_epochs, default=epoch) >= epoch - 1)
                    is_broken = self._is_broken
                stage = None
                if not is_broken:
                    stage, error = attempt(lambda epoch=epoch, items=items: self._fill(epoch, items, pool))
                    if error is not None:
                        self._break_off(error)
                with self._turn:
                    self._stages.append(stage if self._lanes else None)
                    self._turn.notify_all()

    def _fill(self, epoch: int, items: list[Staged], pool: ThreadPoolExecutor) -> _Stage:
        shares, staged, longest = self._prepared.shares, self._prepared.staged, self._prepared.message_bytes
        located = sorted(
            (shares[item.share].site.file, staged[item.share][item.tensor].begin + item.block.offset, item.block.nbytes, index)
            for index, item in enumerate(items)
        )
        places = [0] * len(items)
        # Runs that touch each other in a file are read together.
        runs: list[tuple[str, int, int, int]] = []  # file, begin in the file, begin in the buffer, bytes
        end = 0
        for file, begin, nbytes, index in located:
            if runs and runs[-1][0] == file and runs[-1][1] + runs[-1][3] == begin and runs[-1][3] + nbytes <= longest:
                runs[-1] = (*runs[-1][:3], runs[-1][3] + nbytes)
            else:
                end = -(-end // _ALIGNMENT) * _ALIGNMENT
                runs.append((file, begin, end, nbytes))
            places[index] = end
            end += nbytes
        data = self._buffer(epoch, end)
        with ExitStack() as files:
            # All before anything is read: one that can't be opened closes the others.
            sources = {
                file: files.enter_context(self._storage.open_read(join(self._directory, file)))
                for file in dict.fromkeys(run[0] for run in runs)
            }
            pending = [pool.submit(_read_into, sources[file], begin, data[at : at + nbytes]) for file, begin, at, nbytes in runs]
            for future in pending:
                future.exception()  # the files stay open until nobody reads them
            for future in pending:
                future.result()
        self._count("read", sum(nbytes for _, _, _, nbytes in runs))
        for item, place in zip(items, places, strict=True):
            if self._check is not None:
                self._count("verified", self._check.update(item, memoryview(data[place : place + item.block.nbytes])))
        stage = _Stage(data, places)
        with self._may_write() as allowed:
            if allowed:
                self._keep_own(items, stage)
        return stage

    def _buffer(self, epoch: int, nbytes: int) -> np.ndarray:
        """The buffer of every second epoch, whose last stage has been sent."""
        which = epoch % 2
        if self._buffers[which].nbytes < nbytes:
            self._buffers[which] = np.empty(0, np.uint8)  # the old one goes first
            self._buffers[which] = np.empty(nbytes, np.uint8)
        return self._buffers[which]

    def _keep_own(self, items: list[Staged], stage: _Stage) -> None:
        shares, rank = self._prepared.shares, self._comm.rank
        for item, place in zip(items, stage.places, strict=True):
            for part in item.block.parts:
                if part.rank == rank:
                    share = shares[item.share]
                    dtype = share.arrangement.dtype
                    box = np.ndarray(item.block.shape, dtype.numpy, stage.data, place, share.piece.strides(dtype.itemsize))
                    self._write(share.tensors[item.tensor].key, part, box[part.source.slices])

    def _write(self, key: TensorKey, part: Part, values: np.ndarray) -> None:
        self._tensors[key].shards[part.shard].memory.write(part.target, values)

    def _send(self, lane: int) -> None:
        world = self._comm.world_size
        message = np.empty(0, np.uint8)
        reached = [True] * world
        for epoch in range(len(self._schedule.epochs)):
            for distance in range(1 + lane, world, self._lanes):
                target = (self._comm.rank + distance) % world
                parts = self._schedule.outgoing.get((epoch, target))
                if parts and reached[target]:
                    reached[target] = False
                    with self._reaching(f"rank {target}"):
                        if not message.nbytes:
                            message = np.empty(self._prepared.message_bytes + 1, np.uint8)
                        self._send_parts(epoch, target, parts, message)
                        reached[target] = True
            with self._turn:
                self._sent_epochs[lane] = epoch + 1
                if min(self._sent_epochs) > epoch and epoch < len(self._stages):
                    self._stages[epoch] = None
                self._turn.notify_all()

    def _send_parts(self, epoch: int, target: int, parts: list[Outgoing], message: np.ndarray) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._is_over or len(self._stages) > epoch)
            stage = self._stages[epoch] if len(self._stages) > epoch else None
        end = 0
        for index, part in parts:
            if stage is None or self._is_broken:
                self._comm.send(bytes([_ABORT]), target)
                return
            if end + part.nbytes >= message.nbytes:
                self._send_message(message, end, target)
                end = 0
            item = self._schedule.epochs[epoch][index]
            share = self._prepared.shares[item.share]
            itemsize = share.arrangement.dtype.itemsize
            # As bytes: the places in a message aren't aligned for any type.
            strides = (*share.piece.strides(itemsize), 1)
            box = np.ndarray((*item.block.shape, itemsize), np.uint8, stage.data, stage.places[index], strides)
            message[end : end + part.nbytes].reshape(*part.source.shape, itemsize)[...] = box[part.source.slices]
            end += part.nbytes
        self._send_message(message, end, target)

    def _send_message(self, message: np.ndarray, end: int, target: int) -> None:
        message[end] = _DATA
        self._comm.send(memoryview(message)[: end + 1], target)
        self._count("sent", end)

    def _receive(self, lane: int) -> None:
        world = self._comm.world_size
        reached = [True] * world
        for epoch in range(self._schedule.source_epochs):
            for distance in range(1 + lane, world, self._lanes):
                source = (self._comm.rank - distance) % world
                if (epoch, source) in self._schedule.incoming and reached[source]:
                    reached[source] = False
                    with self._reaching(f"rank {source}"):
                        self._receive_parts(epoch, source)
                        reached[source] = True

    def _receive_parts(self, epoch: int, source: int) -> None:
        parts = self._schedule.incoming[epoch, source]
        at = 0
        while at < len(parts):
            data = self._comm.recv(source)
            if data[-1] == _ABORT:
                self._break_off(None)
                return
            first, end = at, 0
            while at < len(parts) and end + parts[at].part.nbytes < len(data):
                end += parts[at].part.nbytes
                at += 1
            if end != len(data) - 1:
                raise CommunicationError(
                    "a rank sent other bytes than its plan says",
                    rank=self._comm.rank,
                    found=f"{len(data) - 1} bytes from rank {source}",
                    fix="run the same version of reshard, with the same arguments, on every rank",
                )
            with self._may_write() as allowed:
                if allowed:
                    _, error = attempt(lambda first=first, at=at, data=data: self._scatter(parts[first:at], data))
                    if error is not None:
                        self._break_off(error)
            self._count("received", end)

    def _scatter(self, parts: list[Incoming], data: bytes) -> None:
        end = 0
        for key, dtype, part in parts:
            self._write(key, part, np.ndarray(part.source.shape, dtype.numpy, data, end))
            end += part.nbytes


def _read_into(source: ReadableFile, begin: int, target: np.ndarray) -> None:
    source.read_into(begin, memoryview(target))
