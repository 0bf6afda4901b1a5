"""Few ranks of one machine agree over sockets of their own: all tell rank 0, which tells all.

A message here is a call of the system at either end. A library that moves tensors between machines has threads of its own for that, which
must be woken, and take turns with those that wait: on cores that ranks share an agreement of four ranks took them several times as long.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise

from reshard.comm.communicator import Communicator
from reshard.comm.meeting import meet
from reshard.errors import CommunicationError

# Rank 0 hears and tells one after the other: of more, a tree's steps would take less time.
_MOST_RANKS = 64

# Whether what follows is an answer or what went wrong, and its bytes.
_HEAD = struct.Struct("<QQ")
_ANSWER, _FAILURE = 0, 1

# The longest limit (seconds): `poll` takes milliseconds in 32 bits. Some weeks.
_LONGEST_S = 2e6

# Rank 0 alone knows who is late. The others wait so much longer for its word, as a part of the limit, and at most so many seconds: so much
# later than another it may come and still be the one that says it. Who waits for rank 0 itself hears so much later that it is late.
_GRACE = 0.1
_MOST_GRACE_S = 60.0

# Ranks that are still busy with an answer have so long (seconds, together) to take why there is no next one.
_FAREWELL_S = 1.0

# Python makes room for all that is asked for before it knows how much comes: the system keeps hardly more on a connection.
_PIECE_BYTES = 1 << 20


class Star:
    """The collectives of a job whose ranks all run on one machine; as a communicator's, over connections with rank 0.

    After an error, or an interrupt within a collective, there is no next one: the others hear so at once, at the latest when this one is
    closed. Who is gone is noticed by the end of its connection, of which a process that it has forked off lets go at once.

    Args:
        rank: this process's.
        world_size: the number of ranks.
        lines: the connections by the rank at their other end: of rank 0 with all others, of those with rank 0. They are its own now.
        timeout: seconds that a collective may take.

    Attributes:
        rank: this process's.
    """

    def __init__(self, rank: int, world_size: int, lines: Mapping[int, socket.socket], timeout: float) -> None:
        self._lines = dict(lines)
        self.rank = rank
        self._world_size = world_size
        self._timeout = timeout
        self._limit = min(timeout + (min(_GRACE * timeout, _MOST_GRACE_S) if rank else 0.0), _LONGEST_S)
        self._deadline = 0.0
        # Why there can be no collective now. Not before one is over is it known that nothing of it is left on a connection.
        self._why = ""
        self._is_closed = False
        # Ranks to which a part of a message may have gone: nothing may be taken for the rest of it.
        self._half_told: set[int] = set()
        self._process = os.getpid()
        self._poll = select.poll()
        self._ranks = {line.fileno(): other for other, line in self._lines.items()}
        for line in self._lines.values():
            line.setblocking(False)
            self._poll.register(line, select.POLLIN)
        find = weakref.WeakMethod(self.close)

        def in_child() -> None:
            close = find()
            if close is not None:
                close()

        os.register_at_fork(after_in_child=in_child)

    @classmethod
    def connect(cls, comm: Communicator, timeout: float) -> Star | None:
        """The ranks' star; None on all of them where they don't all run on one machine, where there are many, or where one of them
        can't be reached. Collective.

        Args:
            comm: over which they find each other.
            timeout: seconds that a collective may take.

        Raises:
            CommunicationError: over `comm` they don't.
        """
        lines = meet(comm) if comm.world_size <= _MOST_RANKS else None
        return None if lines is None else cls(comm.rank, comm.world_size, lines, timeout)

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order.

        Raises:
            CommunicationError: a rank is gone or late, or this one is closed.
        """
        return self._gather("gather", bytes(data))

    def barrier(self) -> None:
        """Returns when every rank has called it.

        Raises:
            CommunicationError: as `all_gather`.
        """
        self._gather("wait for each other", b"")

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        """The bytes of one rank, on every rank.

        Raises:
            CommunicationError: as `all_gather`, or there is no such rank.
        """
        if not 0 <= source < self._world_size:
            raise CommunicationError(
                "no such rank to hear from", rank=self.rank, found=f"rank {source}", expected=f"one of {self._world_size}"
            )
        data = bytes(data)
        with self._collective("broadcast"):
            if self.rank == source and source:
                self._tell([0], _message(data))
                return data
            if self.rank:
                return self._receive(0)
            if source:
                ((_, data),) = self._hear([source])
            self._tell((rank for rank in range(1, self._world_size) if rank != source), _message(data))
            return data

    def close(self) -> None:
        """Let go of the connections; whoever waits at the other end hears so. Not collective."""
        self._is_closed = True
        try:
            self._hang_up()
        except KeyboardInterrupt:
            self._hang_up()  # all the same: the others would wait
            raise

    def __del__(self) -> None:
        # The last resort, for whoever forgot it.
        with suppress(Exception):
            self.close()

    def _hang_up(self) -> None:
        for line in self._lines.values():
            # A process that was forked off meanwhile has it, too: it mustn't keep the others waiting, nor end what this one goes on with.
            if self._process == os.getpid():
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)
            line.close()

    def _gather(self, what: str, data: bytes) -> list[bytes]:
        with self._collective(what):
            if self.rank:
                self._tell([0], _message(data))
                return _split(self._receive(0), self._world_size)
            heard = {0: data, **dict(self._hear(range(1, self._world_size)))}
            parts = [heard[rank] for rank in range(self._world_size)]
            lengths = struct.pack(f"<{len(parts)}Q", *map(len, parts))
            self._tell(range(1, self._world_size), _message(lengths, *parts))
            return parts

    @contextmanager
    def _collective(self, what: str) -> Iterator[None]:
        """All of one: after a part of it nobody knows what comes next on a connection."""
        if self._why or self._is_closed:
            self._hang_up()
            raise self._error(what, self._why or "this one is closed")
        self._why = "another was under way, or was interrupted"
        self._deadline = time.monotonic() + self._limit
        try:
            yield
        except _BrokenError as broken:
            self._give_up(str(broken))
            raise self._error(what, str(broken)) from broken.__cause__
        except Exception as error:
            self._give_up(f"rank {self.rank}: {type(error).__name__}: {error}")
            raise
        except BaseException:
            self._give_up(f"rank {self.rank} was interrupted")
            raise
        self._why = ""

    def _give_up(self, why: str) -> None:
        try:
            self._why = f"an earlier one failed: {why}"
            if self.rank == 0:  # the others have no other way to learn which rank it was
                message = _message(why.encode(errors="replace"), kind=_FAILURE)
                self._deadline = time.monotonic() + _FAREWELL_S
                with suppress(_BrokenError):
                    self._tell([rank for rank in self._lines if rank not in self._half_told], message)
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
        """What ranks tell, in the order in which it comes. The end of any rank, also of one that isn't awaited, ends the wait at once.

        Raises:
            _BrokenError: a rank is gone or late.
        """
        awaited = set(ranks)
        while awaited:
            events = self._poll.poll(self._left() * 1000)
            if not events:
                raise _BrokenError(f"{_words(awaited)}: {self._late()}")
            for descriptor, _ in events:
                rank = self._ranks[descriptor]
                try:
                    if rank not in awaited:  # it has nothing to say before it is told
                        raise self._broken(rank, EOFError())
                    data = self._receive(rank)
                except _BrokenError as broken:
                    others = awaited - {rank}  # it may have left because one of them is late
                    raise _BrokenError(f"{broken}; {_words(others)} had not come either" if others else str(broken)) from broken.__cause__
                awaited.remove(rank)
                yield rank, data

    def _tell(self, ranks: Iterable[int], message: bytes) -> None:
        """Tell ranks the same, each as fast as it takes it. Where one is gone or late the others hear it all the same.

        Raises:
            _BrokenError: one is gone or late.
        """
        told = dict.fromkeys(ranks, 0)
        broken: list[_BrokenError] = []
        while told:
            for rank, nbytes in list(told.items()):
                told[rank] = self._give(rank, message, nbytes, broken)
            told = {rank: nbytes for rank, nbytes in told.items() if nbytes < len(message)}
            # Waited for only where it has to be: less room than the system asks for before it speaks of any may be enough.
            if told and not self._wait(told, select.POLLOUT):
                broken.append(_BrokenError(f"{_words(told)}: {self._late()}"))
                break
        if broken:
            raise broken[0]

    def _give(self, rank: int, message: bytes, told: int, broken: list[_BrokenError]) -> int:
        """How many bytes of a message a rank has taken, when it took so many before; all, when it is gone, which is noted."""
        self._half_told.add(rank)
        try:
            told += self._lines[rank].send(memoryview(message)[told:], socket.MSG_NOSIGNAL)
        except BlockingIOError:
            pass
        except OSError as error:
            broken.append(self._last_word(rank, error) or self._broken(rank, error))
            return len(message)
        if told in (0, len(message)):
            self._half_told.discard(rank)
        return told

    def _last_word(self, rank: int, error: OSError) -> _BrokenError | None:
        """Why rank 0 has left, if it has said so."""
        if self.rank and isinstance(error, BrokenPipeError | ConnectionResetError):
            try:
                self._receive(rank)
            except _BrokenError as said:
                return said
        return None

    def _receive(self, rank: int) -> bytes:
        try:
            kind, nbytes = _HEAD.unpack(self._exactly(rank, _HEAD.size))
            data = self._exactly(rank, nbytes)
        except (OSError, EOFError) as error:
            raise self._broken(rank, error) from error
        if kind != _ANSWER:
            raise _BrokenError(data.decode(errors="replace"))
        return data

    def _exactly(self, rank: int, nbytes: int) -> bytes:
        """So many bytes from a rank.

        Raises:
            EOFError: its connection ends before.
            OSError: it fails; TimeoutError: the limit is over, and no more of them are there.
        """
        parts, left = [], nbytes
        while left:
            try:
                parts.append(self._lines[rank].recv(min(left, _PIECE_BYTES)))
            except BlockingIOError:
                if not self._wait([rank], select.POLLIN):
                    raise TimeoutError from None
                continue
            if not parts[-1]:
                raise EOFError
            left -= len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _wait(self, ranks: Iterable[int], event: int) -> bool:
        """Whether the connection with one of some ranks gives or takes something before the limit is over."""
        poll = select.poll()
        for descriptor in (self._lines[rank].fileno() for rank in ranks):
            if descriptor < 0:  # it was closed: what is done with it next says so
                return True
            poll.register(descriptor, event)
        return bool(poll.poll(self._left() * 1000))

    def _left(self) -> float:
        """Seconds of the limit; none when it is over: what is there by then is taken all the same, since its sender isn't late."""
        return max(0.0, self._deadline - time.monotonic())

    def _broken(self, rank: int, error: OSError | EOFError) -> _BrokenError:
        if self._is_closed:  # by another thread
            return _BrokenError("this one was closed meanwhile")
        is_over = isinstance(error, EOFError | BrokenPipeError | ConnectionResetError)
        why = self._late() if isinstance(error, TimeoutError) else "its connection has ended" if is_over else str(error)
        return _BrokenError(f"rank {rank}: {why}")

    def _late(self) -> str:
        return f"no answer within {self._timeout:g} s" + (", nor of a rank that it waits for" if self.rank else "")


class _BrokenError(Exception):
    """A collective can't go on; why."""


def _message(*parts: bytes, kind: int = _ANSWER) -> bytes:
    return b"".join([_HEAD.pack(kind, sum(map(len, parts))), *parts])


def _split(data: bytes, number: int) -> list[bytes]:
    """The parts that lie one after the other behind their lengths."""
    lengths = struct.unpack_from(f"<{number}Q", data)
    ends = [8 * number]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [data[begin:end] for begin, end in pairwise(ends)]


def _words(ranks: Iterable[int]) -> str:
    listed = sorted(ranks)
    return f"rank{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed))}"
