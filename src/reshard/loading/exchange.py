"""Ranks read for each other: what one reads goes into its own memory and, in messages, into that of the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from queue import SimpleQueue

import numpy as np

from reshard.catalog import Catalog
from reshard.comm import Communicator
from reshard.comm.together import attempt
from reshard.errors import CommunicationError, ReshardError, UsageError
from reshard.format.safetensors import TensorEntry
from reshard.loading.reader import READERS, locate, read_plan
from reshard.planning.agreement import RankDescription
from reshard.planning.byte_runs import strides_of
from reshard.planning.exchange_plan import Part, Share, plan_exchange
from reshard.planning.exchange_schedule import Outgoing, Schedule, Staged, schedule_exchange
from reshard.planning.read_plan import ReadPlan
from reshard.sources.native import Headers
from reshard.state import State, TensorKey
from reshard.storage import ReadableFile, Storage
from reshard.storage.storage import join

MEMORY_BUDGET = 256 << 20
"""Bytes that a balanced load takes beyond the state, unless it is told otherwise."""

# Pairs of threads that send and receive, each with messages of its own in flight.
_LANES = 2

# A message is at most this long: above some MiB nothing is gained, and each costs four times its length in buffers of both ends.
_MESSAGE_BYTES = 4 << 20

# What is read before it is sent, at most; the next stage is read meanwhile. More would only delay the first message.
_STAGE_BYTES = 32 << 20

# Gaps inside a box that nobody in the job wants are read over up to a page: less than that no file system reads anyway.
_GAP_BYTES = 4096

# Below this a message holds less than what it costs.
_LEAST_BUDGET = 1 << 20

# The last byte of a message.
_DATA, _ABORT = 0, 1

_ALIGNMENT = 64


@dataclass(frozen=True)
class Traffic:
    """What a rank moved, in bytes.

    Attributes:
        read: of data files, gaps included.
        sent: to other ranks.
        received: from other ranks.
    """

    read: int
    sent: int
    received: int


@dataclass(frozen=True)
class PreparedExchange:
    """One rank's part of an exchange, checked against the headers of the files that it reads.

    Attributes:
        straight: what it reads for itself alone.
        entries: where that lies.
        shares: what it stages.
        begins: of each of these shares, where each tensor's data begins in the file.
        schedule: in which order it stages, sends and receives.
        message_bytes: the longest message.
    """

    straight: ReadPlan
    entries: list[TensorEntry]
    shares: tuple[Share, ...]
    begins: tuple[tuple[int, ...], ...]
    schedule: Schedule
    message_bytes: int

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the rank reads, in order."""
        return tuple(dict.fromkeys((*self.straight.files, *(share.site.file for share in self.shares))))


def prepare_exchange(
    descriptions: Sequence[RankDescription], catalog: Catalog, headers: Headers, rank: int, memory_budget: int
) -> PreparedExchange:
    """Plan a balanced load, and look whether the files hold what this rank is to read of them.

    Args:
        descriptions: of all ranks: the tensors that they load.
        catalog: what the checkpoint holds, the same on every rank.
        headers: of its files.
        rank: this rank.
        memory_budget: bytes for staging and messages together.

    Raises:
        UsageError: a budget too small to work with.
        DataFileError: a file is missing, damaged, or doesn't hold what metadata promises.
    """
    if memory_budget < _LEAST_BUDGET:
        raise UsageError(
            "too little memory to exchange anything", field="memory_budget", found=memory_budget, expected=f"at least {_LEAST_BUDGET} bytes"
        )
    plan = plan_exchange(descriptions, catalog)
    # Each lane has a message on either end, and a communicator may hold another copy of each; the rest is for two stages.
    message = min(_MESSAGE_BYTES, memory_budget // (_LANES * 16))
    stage = min(_STAGE_BYTES, (memory_budget - 4 * _LANES * message) // 2)
    schedule = schedule_exchange(plan, rank, stage_bytes=stage, block_bytes=message, gap_bytes=_GAP_BYTES)
    mine = [share for share in plan.shares if share.reader == rank]
    transfers = tuple(transfer for share in mine if share.is_straight for transfer in share.transfers())
    straight = ReadPlan(rank, transfers, (), (), ())
    staged = tuple(share for share in mine if not share.is_straight)
    begins = tuple(_begins(share, headers) for share in staged)
    return PreparedExchange(straight, locate(straight, headers), staged, begins, schedule, message)


def _begins(share: Share, headers: Headers) -> tuple[int, ...]:
    held = headers.get(share.site.file).entries
    dtype, shape = share.arrangement.dtype, share.piece.region.shape
    begins = []
    for tensor in share.tensors:
        name = tensor.name + share.site.suffix
        entry = held.get(name)
        if entry is None or entry.shape != shape or entry.dtype != dtype:
            raise headers.broken_promise(share.site.file, name, dtype, shape)
        begins.append(entry.begin)
    return tuple(begins)


def run_exchange(prepared: PreparedExchange, state: State, comm: Communicator, storage: Storage, directory: str) -> Traffic:
    """Fill the states of a job. Every rank that has a plan calls it.

    A rank that fails tells the others, which then return early, their memory partly filled: whoever calls this must let the ranks tell each
    other how it went.

    Args:
        prepared: this rank's part.
        state: the state whose description was planned.
        comm: the ranks; nothing else uses it meanwhile.
        storage: where the files lie.
        directory: the checkpoint.

    Raises:
        DamagedCheckpointError: a file is not what it promises.
        StorageError: reading failed.
        CommunicationError: a rank is gone.
    """
    return _Exchange(prepared, state, comm, storage, directory).run()


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
    """

    def __init__(self, prepared: PreparedExchange, state: State, comm: Communicator, storage: Storage, directory: str) -> None:
        self._prepared = prepared
        self._schedule = prepared.schedule
        self._tensors = state.tensors
        self._state = state
        self._comm = comm
        self._storage = storage
        self._directory = directory
        self._lanes = min(_LANES, comm.world_size - 1)
        self._turn = threading.Condition()
        # Of each epoch that was read: the stage, or None when there is nothing to send but that this rank broke off.
        self._stages: list[_Stage | None] = []
        self._sent_epochs = [0] * self._lanes
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self._error: ReshardError | None = None
        self._is_broken = False
        self._is_over = False
        self._counts = {"read": 0, "sent": 0, "received": 0}

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

        for work in workers:
            threading.Thread(target=guarded, args=(work,), name="reshard-exchange", daemon=True).start()
        try:
            prepared = self._prepared
            # Exact: bytes beside a run may be another rank's to read.
            nbytes, error = attempt(
                lambda: read_plan(prepared.straight, prepared.entries, self._state, self._storage, self._directory, gap_bytes=0)
            )
            if error is not None:
                self._break_off(error)
            self._count("read", nbytes or 0)
            for _ in workers:
                # What a thread could not tell the other ranks ends the exchange here; threads that wait for a rank that is gone are
                # left behind.
                outcome = outcomes.get()
                if outcome is not None:
                    raise outcome
        finally:
            with self._turn:
                self._is_over = True
                self._turn.notify_all()
        if self._error is not None:
            raise self._error
        return Traffic(**self._counts)

    def _break_off(self, error: ReshardError | None) -> None:
        """Read and write nothing more, but tell everyone who waits for something; None: another rank did."""
        with self._turn:
            self._is_broken = True
            if self._error is None:
                self._error = error
            self._turn.notify_all()

    def _count(self, what: str, nbytes: int) -> None:
        with self._turn:
            self._counts[what] += nbytes

    def _read(self) -> None:
        """Stage after stage, at most one ahead of what is being sent."""
        with ThreadPoolExecutor(READERS, "reshard-read") as pool:
            for epoch, items in enumerate(self._schedule.epochs):
                with self._turn:
                    self._turn.wait_for(lambda epoch=epoch: self._is_over or min(self._sent_epochs, default=epoch) >= epoch - 1)
                    is_broken = self._is_broken or self._is_over
                stage = None
                if not is_broken:
                    stage, error = attempt(lambda epoch=epoch, items=items: self._fill(epoch, items, pool))
                    if error is not None:
                        self._break_off(error)
                with self._turn:
                    self._stages.append(stage)
                    self._turn.notify_all()

    def _fill(self, epoch: int, items: list[Staged], pool: ThreadPoolExecutor) -> _Stage:
        prepared = self._prepared
        located = sorted(
            (prepared.shares[item.share].site.file, prepared.begins[item.share][item.tensor] + item.block.offset, item.block.nbytes, index)
            for index, item in enumerate(items)
        )
        places = [0] * len(items)
        # Runs that touch each other in a file are read together.
        runs: list[tuple[str, int, int, int]] = []  # file, begin in the file, begin in the buffer, bytes
        end = 0
        for file, begin, nbytes, index in located:
            if runs and runs[-1][0] == file and runs[-1][1] + runs[-1][3] == begin and runs[-1][3] + nbytes <= prepared.message_bytes:
                runs[-1] = (*runs[-1][:3], runs[-1][3] + nbytes)
            else:
                end = -(-end // _ALIGNMENT) * _ALIGNMENT
                runs.append((file, begin, end, nbytes))
            places[index] = end
            end += nbytes
        data = self._buffers[epoch % 2]
        if data.nbytes < end:
            data = self._buffers[epoch % 2] = np.empty(end, np.uint8)
        with ExitStack() as files:
            pending = []
            for file, group in groupby(runs, key=lambda run: run[0]):
                source = files.enter_context(self._storage.open_read(join(self._directory, file)))
                pending += [pool.submit(_read_into, source, begin, data[at : at + nbytes]) for _, begin, at, nbytes in group]
            for future in pending:
                future.exception()  # the files stay open until nobody reads them
            for future in pending:
                future.result()
        self._count("read", sum(nbytes for _, _, _, nbytes in runs))
        stage = _Stage(data, places)
        rank = self._comm.rank
        for item, place in zip(items, places, strict=True):
            for part in item.block.parts:
                if part.rank == rank:
                    share = prepared.shares[item.share]
                    dtype = share.arrangement.dtype
                    box = np.ndarray(item.block.shape, dtype.numpy, data, place, strides_of(share.piece.region.shape, dtype.itemsize))
                    self._write(share.tensors[item.tensor].key, part, box[part.source.slices])
        return stage

    def _write(self, key: TensorKey, part: Part, values: np.ndarray) -> None:
        self._tensors[key].shards[part.shard].memory.write(part.target, values)

    def _send(self, lane: int) -> None:
        comm = self._comm
        message = np.empty(0, np.uint8)
        for epoch in range(len(self._schedule.epochs)):
            for distance in range(1 + lane, comm.world_size, self._lanes):
                target = (comm.rank + distance) % comm.world_size
                parts = self._schedule.outgoing.get((epoch, target))
                if parts:
                    if not message.nbytes:
                        message = np.empty(self._prepared.message_bytes + 1, np.uint8)
                    self._send_parts(epoch, target, parts, message)
            with self._turn:
                self._sent_epochs[lane] = epoch + 1
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
            strides = (*strides_of(share.piece.region.shape, itemsize), 1)
            box = np.ndarray((*item.block.shape, itemsize), np.uint8, stage.data, stage.places[index], strides)
            message[end : end + part.nbytes].reshape(*part.source.shape, itemsize)[...] = box[part.source.slices]
            end += part.nbytes
        self._send_message(message, end, target)

    def _send_message(self, message: np.ndarray, end: int, target: int) -> None:
        message[end] = _DATA
        self._comm.send(memoryview(message)[: end + 1], target)
        self._count("sent", end)

    def _receive(self, lane: int) -> None:
        comm = self._comm
        for epoch in range(self._schedule.source_epochs):
            for distance in range(1 + lane, comm.world_size, self._lanes):
                source = (comm.rank - distance) % comm.world_size
                if (epoch, source) in self._schedule.incoming:
                    self._receive_parts(epoch, source)

    def _receive_parts(self, epoch: int, source: int) -> None:
        parts = self._schedule.incoming[epoch, source]
        at = 0
        while at < len(parts):
            data = self._comm.recv(source)
            if data[-1] == _ABORT:
                self._break_off(None)
                return
            end = 0
            while end < len(data) - 1 and at < len(parts):
                key, dtype, part = parts[at]
                if end + part.nbytes > len(data) - 1:
                    break
                if not self._is_broken:
                    values = np.ndarray(part.source.shape, dtype.numpy, data, end)
                    _, error = attempt(lambda key=key, part=part, values=values: self._write(key, part, values))
                    if error is not None:
                        self._break_off(error)
                end += part.nbytes
                at += 1
            if end != len(data) - 1:
                raise CommunicationError(
                    "a rank sent other bytes than its plan says",
                    rank=self._comm.rank,
                    found=f"{len(data) - 1} bytes from rank {source}",
                    fix="run the same version of reshard, with the same arguments, on every rank",
                )
            self._count("received", end)


def _read_into(source: ReadableFile, begin: int, target: np.ndarray) -> None:
    source.read_into(begin, memoryview(target))
