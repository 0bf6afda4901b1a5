"""Ranks talk through torch.distributed, in a gloo group of their own: bytes on the host, apart from training's collectives."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from reshard.comm import Communicator, SingleProcess
from reshard.comm.star import Star
from reshard.errors import CommunicationError

T = TypeVar("T")

# What fits into the first message besides the length goes with it: most of what ranks tell each other is this small, and a message less
# is a round trip less.
_INLINE = 4096
_LENGTH = 8

# The same of a broadcast, of which there is one for all ranks: what is told of a checkpoint of some hundred tensors fits.
_INLINE_OF_ALL = 32 << 10

# To so many ranks a rank sends a message itself: torch has a thread of its own for collectives, and to wake it at either end takes longer
# than the message. With more ranks the steps of a broadcast, of which each tells twice as many, are fewer than the messages of one rank.
_MOST_TOLD = 16

# Answers of collectives are numbered by their tags, up to this one: a rank that was interrupted in one must not take for what the next one
# tells what it didn't take then. What ranks send to each other has the tag 0.
_LAST_TAG = 2**31 - 1

# Longer data goes in blocks, so that the copies in flight stay small.
_BLOCK = 16 * 2**20

DEFAULT_TIMEOUT = 1800.0
"""Seconds without an answer after which a rank is taken for gone: gloo's own default."""


def connect(timeout: float = DEFAULT_TIMEOUT) -> Communicator:
    """A communicator over the ranks of torch.distributed, or of a single process where that isn't initialised or has one rank. Collective.

    Args:
        timeout: seconds that a collective or a message may take.

    Raises:
        CommunicationError: the ranks don't reach each other.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return SingleProcess()
    return TorchCommunicator(timeout)


class TorchCommunicator:
    """All ranks of torch.distributed, in a gloo group of their own.

    What all agree on goes over sockets of their own where they run on one machine; it does so also after `destroy_process_group()`, so that
    a save that is under way then isn't lost.

    Args:
        timeout: seconds that a collective or a message may take.
        star: whether it may go over such sockets.

    Raises:
        CommunicationError: the ranks don't reach each other.
    """

    def __init__(self, timeout: float = DEFAULT_TIMEOUT, *, star: bool = True) -> None:
        self._timeout = timeout
        self._star: Star | None = None
        self._board: StoreBoard | None = None
        self._told = 0
        self.rank: int = torch.distributed.get_rank()
        self.world_size: int = torch.distributed.get_world_size()
        self._group: Any = None
        self._group = self._try(
            "make a group", lambda: torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout), group_desc="reshard")
        )
        if star:
            try:
                self._star = Star.connect(self, timeout)
            except BaseException:
                self.close()
                raise

    def all_gather(self, data: bytes) -> list[bytes]:
        if self._star is not None:
            return self._star.all_gather(data)
        # To rank 0 and back: gloo's own gathering to all goes around a ring, with as many steps one after the other as there are ranks.
        self._told = self._told % _LAST_TAG + 1  # before anything that may be interrupted
        first = _buffer(self.world_size, _INLINE)
        rows = list(first.unbind()) if self.rank == 0 else None
        mine = _head(data)
        under_way = self._try("gather", lambda: torch.distributed.gather(mine, rows, 0, group=self._group, async_op=self.rank != 0))
        self._try("gather", lambda: self._tell_all(first, 0))
        if under_way is not None:
            self._try("gather", under_way.wait)
        heads = [row.numpy() for row in first]
        lengths = [_length(head) for head in heads]
        inline = _INLINE - _LENGTH
        parts = [bytearray(head[_LENGTH : _LENGTH + min(length, inline)]) for head, length in zip(heads, lengths, strict=True)]
        rest = [max(length - inline, 0) for length in lengths]
        if self.world_size * max(rest) <= 2 * sum(rest):
            self._gather_rest(data, parts, rest)
        else:
            # Few ranks have much to say: each in turn, instead of all as much as the longest.
            for rank in range(self.world_size):
                self._broadcast_rest(data, parts[rank], inline, rest[rank], rank)
        return [bytes(part) for part in parts]

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        if self._star is not None:
            return self._star.broadcast(data, source)
        self._told = self._told % _LAST_TAG + 1
        head = _head(data if self.rank == source else b"", _INLINE_OF_ALL)
        self._try("broadcast", lambda: self._tell_all(head, source))
        array = head.numpy()
        length = _length(array)
        inline = _INLINE_OF_ALL - _LENGTH
        result = bytearray(array[_LENGTH : _LENGTH + min(length, inline)])
        self._broadcast_rest(data, result, inline, max(length - inline, 0), source)
        return bytes(result)

    def barrier(self) -> None:
        if self._star is not None:
            self._star.barrier()
            return
        self._try("wait for each other", lambda: torch.distributed.barrier(group=self._group))

    def send(self, data: bytes | memoryview, target: int) -> None:
        self._check_peer(target)
        head = _head(data)
        self._try(f"send to rank {target}", lambda: torch.distributed.send(head, target, group=self._group))
        for begin, end in _blocks(_INLINE - _LENGTH, _nbytes(data)):
            block = _tensor(data, begin, end)
            self._try(f"send to rank {target}", lambda block=block: torch.distributed.send(block, target, group=self._group))

    def recv(self, source: int) -> bytes:
        self._check_peer(source)
        head = _buffer(_INLINE)
        self._try(f"hear from rank {source}", lambda: torch.distributed.recv(head, source, group=self._group))
        array = head.numpy()
        length = _length(array)
        inline = _INLINE - _LENGTH
        result = bytearray(length)
        result[:inline] = array[_LENGTH : _LENGTH + min(length, inline)].tobytes()
        for begin, end in _blocks(inline, length):
            block = torch.frombuffer(result, dtype=torch.uint8, offset=begin, count=end - begin)
            self._try(f"hear from rank {source}", lambda block=block: torch.distributed.recv(block, source, group=self._group))
        return bytes(result)

    def duplicate(self) -> TorchCommunicator:
        return TorchCommunicator(self._timeout, star=self._star is not None)

    def board(self) -> StoreBoard:
        if self._board is None:
            self._board = StoreBoard(self.rank)
        return self._board

    def close(self) -> None:
        try:
            if self._star is not None:
                self._star.close()
        finally:
            group, self._group = self._group, None
            if group is not None and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group(group)

    def _tell_all(self, message: torch.Tensor, source: int) -> None:
        """One rank's short message for all."""
        if self.world_size > _MOST_TOLD:
            torch.distributed.broadcast(message, source, group=self._group)
        elif self.rank == source:
            sent: list[Any] = []

            def send(rank: int) -> None:
                sent.append(torch.distributed.isend(message, rank, group=self._group, tag=self._told))

            # Where one is gone, the others must hear it all the same.
            failed = [_failure_of(partial(send, rank)) for rank in range(self.world_size) if rank != source]
            failed += [_failure_of(one.wait) for one in sent]
            first = next((error for error in failed if error is not None), None)
            if first is not None:
                raise first
        else:
            torch.distributed.recv(message, source, group=self._group, tag=self._told)

    def _gather_rest(self, data: bytes, parts: list[bytearray], rest: list[int]) -> None:
        """Gather what didn't fit inline: as many bytes of each rank at a time as the longest has left, at most a block for all."""
        block = max(_BLOCK // self.world_size, _INLINE)
        for begin in range(0, max(rest), block):
            size = min(block, max(rest) - begin)
            start = _INLINE - _LENGTH + begin
            mine = _buffer(size)
            piece = _tensor(data, min(start, len(data)), min(start + size, len(data)))
            mine[: piece.numel()] = piece
            rows = _buffer(self.world_size, size)
            self._try("gather", lambda mine=mine, rows=rows: torch.distributed.all_gather(list(rows.unbind()), mine, group=self._group))
            for part, length, row in zip(parts, rest, rows, strict=True):
                part += row[: max(min(length - begin, size), 0)].numpy().tobytes()

    def _broadcast_rest(self, data: bytes, part: bytearray, inline: int, rest: int, source: int) -> None:
        """Broadcast what didn't fit inline, and append it."""
        for begin, end in _blocks(inline, inline + rest):
            block = _tensor(data, begin, end) if self.rank == source else _buffer(end - begin)
            self._try("broadcast", lambda block=block: torch.distributed.broadcast(block, source, group=self._group))
            part += block.numpy().tobytes()

    def _check_peer(self, rank: int) -> None:
        if rank == self.rank or not 0 <= rank < self.world_size:
            raise CommunicationError(
                "no such rank to talk to", rank=self.rank, found=f"rank {rank}", expected=f"another of {self.world_size}"
            )

    def _try(self, what: str, action: Callable[[], T]) -> T:
        try:
            return action()
        except (RuntimeError, ValueError) as error:
            is_over = not torch.distributed.is_initialized()
            fix = "look at the other ranks' messages first: one of them may have ended; then start the run again"
            raise CommunicationError(
                f"ranks could not {what}",
                rank=self.rank,
                found="destroy_process_group() was called before" if is_over else _words_of(error),
                fix="close the manager first: it waits for the save that is under way" if is_over else fix,
            ) from error.with_traceback(None)  # its frames hold the group: connections end when nobody holds it any more


class StoreBoard:
    """Notices in the store through which the ranks of the job found each other.

    Args:
        rank: whose notices are posted.
    """

    def __init__(self, rank: int) -> None:
        distributed: Any = torch.distributed
        store = distributed.distributed_c10d._get_default_store()
        # One of its own: who waits for a key in the other holds all who want anything of it.
        self._store: Any = distributed.PrefixStore("reshard/board", store.clone() if hasattr(store, "clone") else store)
        self._rank = rank

    def post(self, topic: str, data: bytes, *, shared: bool = False) -> None:
        try:
            self._store.set(_key(topic, None if shared else self._rank), data)
        except RuntimeError as error:
            raise _store_is_gone(self._rank, error) from error.with_traceback(None)

    def read(self, topic: str, rank: int | None) -> bytes | None:
        key = _key(topic, rank)
        try:
            return self._store.get(key) if self._store.check([key]) else None
        except RuntimeError as error:
            raise _store_is_gone(self._rank, error) from error.with_traceback(None)

    def read_all(self, topic: str, world_size: int) -> list[bytes | None]:
        keys = [f"{topic}/{rank}" for rank in range(world_size)]
        try:
            # Two questions for thousands of ranks.
            if self._store.check(keys):
                return list(self._store.multi_get(keys))
        except RuntimeError as error:
            raise _store_is_gone(self._rank, error) from error.with_traceback(None)
        return [self.read(topic, rank) for rank in range(world_size)]


def _key(topic: str, rank: int | None) -> str:
    return f"{topic}/{'all' if rank is None else rank}"


def _store_is_gone(rank: int, error: Exception) -> CommunicationError:
    return CommunicationError(
        "the job's store can't be reached", rank=rank, found=_words_of(error), fix="look at rank 0 and the launcher: one of them has ended"
    )


def _words_of(error: Exception) -> str:
    """What gloo says, without the place in its source and its guesses."""
    first = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[\S*\.(cc|cpp|h):\d+\]\s*", "", first).partition(". This is typically")[0] or type(error).__name__


def _failure_of(action: Callable[[], object]) -> RuntimeError | None:
    try:
        action()
    except RuntimeError as error:
        return error
    return None


def _nbytes(data: bytes | memoryview) -> int:
    return data.nbytes if isinstance(data, memoryview) else len(data)


def _buffer(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device="cpu")  # whatever the default device is


def _blocks(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for start in range(begin, end, _BLOCK):
        yield start, min(start + _BLOCK, end)


def _head(data: bytes | memoryview, nbytes: int = _INLINE) -> torch.Tensor:
    """The first message: the length, and as much of the data as fits."""
    head = np.zeros(nbytes, np.uint8)
    head[:_LENGTH] = np.frombuffer(_nbytes(data).to_bytes(_LENGTH, "little"), np.uint8)
    piece = np.frombuffer(data, np.uint8)[: nbytes - _LENGTH]
    head[_LENGTH : _LENGTH + len(piece)] = piece
    return torch.from_numpy(head)


def _length(head: np.ndarray) -> int:
    return int.from_bytes(head[:_LENGTH].tobytes(), "little")


def _tensor(data: bytes | memoryview, begin: int, end: int) -> torch.Tensor:
    """A part of the data as a tensor: a copy, since torch takes no read-only memory."""
    return torch.from_numpy(np.frombuffer(data, np.uint8)[begin:end].copy())
