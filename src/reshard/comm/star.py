"""Few ranks of one machine agree over sockets of their own: all tell rank 0, which tells all.

A message here is a call of the system at either end. A library that moves tensors between machines has threads of its own for that, which
must be woken, and take turns with those that wait: on cores that ranks share an agreement of four ranks took them several times as long.
"""

from __future__ import annotations

import hmac
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise

import msgspec

from reshard.comm.communicator import Communicator
from reshard.comm.neighbours import find_host
from reshard.errors import CommunicationError

# Rank 0 hears and tells one after the other: of more, a tree's steps would take less time.
_MOST_RANKS = 64

# Whether what follows is an answer or what went wrong, and its bytes.
_HEAD = struct.Struct("<QQ")
_ANSWER, _FAILURE = 0, 1

# The longest limit (seconds) that Python takes for a socket: some weeks.
_LONGEST_S = 2e6

# Those that are still busy with an answer have so long (seconds, together) to take why there is no next one.
_FAREWELL_S = 1.0

# Python makes room for all that is asked for before it knows how much comes: the system keeps hardly more on a connection.
_PIECE_BYTES = 1 << 20

_KEY_BYTES = 32
_RANK_BYTES = 4


class _Place(msgspec.Struct, array_like=True, frozen=True):
    """Where a rank runs, and where rank 0 listens.

    Attributes:
        host: the machine, and what of its network the process can see; empty where nothing tells.
        name: of rank 0's socket; empty of the others, and where there is none.
        key: what only ranks of the job know.
    """

    host: str
    name: str = ""
    key: bytes = b""


class Star:
    """The collectives of a job whose ranks all run on one machine.

    After an error, and after an interrupt within one, there is no next collective: all ranks hear so.

    Args:
        rank: this process's.
        world_size: the number of ranks.
        lines: the connections by the rank at their other end: of rank 0 with all others, of those with rank 0. They are its own now.
        timeout: seconds that an answer may take.

    Attributes:
        rank: this process's.
    """

    def __init__(self, rank: int, world_size: int, lines: Mapping[int, socket.socket], timeout: float) -> None:
        self._lines = dict(lines)
        self.rank = rank
        self._world_size = world_size
        self._timeout = min(timeout, _LONGEST_S)
        # Not before a collective is over is it known that nothing of it is left on a connection, however it ends.
        self._is_whole = True
        # Ranks to which a part of a message may have gone: nothing may be taken for the rest of it.
        self._half_told: set[int] = set()
        self._process = os.getpid()
        self._calls = select.poll()
        for line in self._lines.values():
            line.settimeout(self._timeout)
            self._calls.register(line, select.POLLIN)

    @classmethod
    def connect(cls, comm: Communicator, timeout: float) -> Star | None:
        """The ranks' star; None on all of them where they don't all run on one machine, where there are many, or where one of them
        can't be reached. Collective.

        Args:
            comm: over which they find each other.
            timeout: seconds that an answer may take.

        Raises:
            CommunicationError: over `comm` they don't.
        """
        if comm.world_size > _MOST_RANKS:
            return None
        host = find_host("net") or ""
        with ExitStack() as opened:
            listener, mine = None, _Place(host)
            if comm.rank == 0 and host:
                with suppress(OSError):
                    name = f"\0reshard-{secrets.token_hex(16)}"
                    listener = opened.enter_context(_listen(name, comm.world_size))
                    mine = _Place(host, name, secrets.token_bytes(_KEY_BYTES))
            places = [msgspec.msgpack.decode(told, type=_Place) for told in comm.all_gather(msgspec.msgpack.encode(mine))]
            first = places[0]
            if not first.name or any(place.host != host for place in places):
                return None
            lines: dict[int, socket.socket] = {}
            if listener is None:
                with suppress(OSError):
                    lines[0] = opened.enter_context(_call(first, comm.rank))
            # Whoever has called needn't be waited for any more.
            called = comm.all_gather(b"called" if lines else b"")
            if listener is not None and all(called[1:]):
                with suppress(OSError):
                    lines = _accept(listener, comm.world_size, first.key)
                for line in lines.values():
                    opened.enter_context(line)
            if not comm.broadcast(b"all" if lines else b""):
                return None
            star = cls(comm.rank, comm.world_size, lines, timeout)
            if listener is not None:
                listener.close()
            opened.pop_all()
            return star

    def all_gather(self, data: bytes) -> list[bytes]:
        """As a communicator's."""
        return self._gather("gather", data)

    def barrier(self) -> None:
        """As a communicator's."""
        self._gather("wait for each other", b"")

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        """As a communicator's."""
        with self._whole("broadcast"):
            if self.rank == source and source:
                self._send(0, [data])
                return data
            if self.rank:
                return self._receive(0)
            if source:
                ((_, data),) = self._hear([source])
            self._tell((rank for rank in range(1, self._world_size) if rank != source), [data])
            return data

    def close(self) -> None:
        """Let go of the connections; whoever waits at the other end hears so. Not collective."""
        self._is_whole = False
        for line in self._lines.values():
            # A process that was forked off meanwhile has it, too: it mustn't keep the others waiting, nor end what this one goes on with.
            if self._process == os.getpid():
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)
            line.close()

    def __del__(self) -> None:
        # The last resort, for whoever forgot it.
        with suppress(Exception):
            self.close()

    def _gather(self, what: str, data: bytes) -> list[bytes]:
        with self._whole(what):
            if self.rank:
                self._send(0, [data])
                return _split(self._receive(0), self._world_size)
            heard = {0: data, **dict(self._hear(range(1, self._world_size)))}
            parts = [heard[rank] for rank in range(self._world_size)]
            lengths = struct.pack(f"<{len(parts)}Q", *map(len, parts))
            self._tell(range(1, self._world_size), [lengths, *parts])
            return parts

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        """All of a collective: after a part of it nobody knows what comes next on a connection."""
        if not self._is_whole:
            self.close()
            raise self._error(what, "the connections with them are closed: they broke off before")
        self._is_whole = False
        try:
            yield
        except _BrokenError as broken:
            self._give_up(str(broken))
            raise self._error(what, str(broken)) from broken.__cause__
        except BaseException:
            self._give_up(f"rank {self.rank} was interrupted")
            raise
        self._is_whole = True

    def _give_up(self, why: str) -> None:
        try:
            if self.rank == 0:  # the others have no other way to learn which rank it was
                message = _HEAD.pack(_FAILURE, len(why.encode())) + why.encode()
                latest = time.monotonic() + _FAREWELL_S
                for rank, line in self._lines.items():
                    if rank not in self._half_told:
                        with suppress(OSError):
                            line.settimeout(max(0.0, latest - time.monotonic()))
                            line.sendall(message, socket.MSG_NOSIGNAL)
        finally:
            self.close()

    def _error(self, what: str, found: str) -> CommunicationError:
        return CommunicationError(
            f"ranks could not {what}",
            rank=self.rank,
            found=found,
            fix="look at the other ranks' messages first: one of them may have ended; then start the run again",
        )

    def _hear(self, ranks: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """What ranks tell, in the order in which they come; of one that is gone at once, whoever else is still awaited."""
        awaited = {self._lines[rank].fileno(): rank for rank in ranks}
        deadline = time.monotonic() + self._timeout
        while awaited:
            called = self._calls.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not called:
                late = ", ".join(map(str, sorted(awaited.values())))
                raise _BrokenError(f"rank{'s' if len(awaited) > 1 else ''} {late}: no answer within {self._timeout:g} s")
            for descriptor, _ in called:
                if descriptor not in awaited:  # it has nothing to say before it is told
                    rank = next(rank for rank, line in self._lines.items() if line.fileno() == descriptor)
                    raise _BrokenError(f"rank {rank}: its connection has ended")
                rank = awaited.pop(descriptor)
                yield rank, self._receive(rank)

    def _tell(self, ranks: Iterable[int], parts: Sequence[bytes]) -> None:
        """Tell ranks the same. Where one is gone the others hear it all the same."""
        failed = [failure for rank in ranks if (failure := _failure_of(lambda rank=rank: self._send(rank, parts))) is not None]
        if failed:
            raise failed[0]

    def _send(self, rank: int, parts: Sequence[bytes]) -> None:
        message = b"".join([_HEAD.pack(_ANSWER, sum(map(len, parts))), *parts])
        self._half_told.add(rank)
        try:
            self._lines[rank].sendall(message, socket.MSG_NOSIGNAL)
        except OSError as error:
            if self.rank and isinstance(error, BrokenPipeError | ConnectionResetError):
                self._receive(rank)  # it has left, and may have said why
            raise _broken(rank, error, self._timeout) from error
        self._half_told.discard(rank)

    def _receive(self, rank: int) -> bytes:
        kind, nbytes = _HEAD.unpack(self._exactly(rank, _HEAD.size))
        data = self._exactly(rank, nbytes)
        if kind != _ANSWER:
            raise _BrokenError(data.decode(errors="replace"))
        return data

    def _exactly(self, rank: int, nbytes: int) -> bytes:
        try:
            return _read(self._lines[rank], nbytes)
        except (OSError, EOFError) as error:
            raise _broken(rank, error, self._timeout) from error


class _BrokenError(Exception):
    """A collective can't go on; why."""


def _broken(rank: int, error: OSError | EOFError, timeout: float) -> _BrokenError:
    is_late = isinstance(error, TimeoutError)
    is_over = isinstance(error, EOFError | BrokenPipeError | ConnectionResetError)
    return _BrokenError(
        f"rank {rank}: " + (f"no answer within {timeout:g} s" if is_late else "its connection has ended" if is_over else str(error))
    )


def _failure_of(action: Callable[[], None]) -> _BrokenError | None:
    try:
        action()
    except _BrokenError as error:
        return error
    return None


def _read(line: socket.socket, nbytes: int) -> bytes:
    """So many bytes.

    Raises:
        EOFError: the connection ends before.
        OSError: it fails; TimeoutError: nothing comes within its limit.
    """
    data = line.recv(min(nbytes, _PIECE_BYTES)) if nbytes else b""
    if len(data) == nbytes:  # nearly always
        return data
    parts = [data]
    left = nbytes - len(data)
    while left:
        if not parts[-1]:
            raise EOFError
        parts.append(line.recv(min(left, _PIECE_BYTES)))
        left -= len(parts[-1])
    return b"".join(parts)


def _split(data: bytes, number: int) -> list[bytes]:
    lengths = struct.unpack_from(f"<{number}Q", data)
    ends = [8 * number]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [data[begin:end] for begin, end in pairwise(ends)]


def _listen(name: str, backlog: int) -> socket.socket:
    """A socket under a name that is no file's, and ends with it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(name)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def _call(first: _Place, rank: int) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.setblocking(False)  # a listener that was made for all has room for all
        line.connect(first.name)
        line.sendall(first.key + rank.to_bytes(_RANK_BYTES, "little"), socket.MSG_NOSIGNAL)
    except OSError:
        line.close()
        raise
    return line


def _accept(listener: socket.socket, world_size: int, key: bytes) -> dict[int, socket.socket]:
    """The connections with all others, who have called; strangers are sent away.

    Raises:
        OSError: there are fewer, or the system has no room for them.
    """
    with ExitStack() as opened:
        lines: dict[int, socket.socket] = {}
        listener.setblocking(False)
        while len(lines) < world_size - 1:
            line, _ = listener.accept()
            told = b""
            line.setblocking(False)
            with suppress(OSError):
                told = line.recv(len(key) + _RANK_BYTES)
            rank = int.from_bytes(told[len(key) :], "little")
            if hmac.compare_digest(told[: len(key)], key) and 0 < rank < world_size and rank not in lines:
                lines[rank] = opened.enter_context(line)
            else:
                line.close()
        opened.pop_all()
        return lines
