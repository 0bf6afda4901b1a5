"""Real processes without a framework: forked from a warm parent, so that a job of four costs some hundredths of a second."""

from __future__ import annotations

import os
import signal
import socket
import struct
import traceback
from collections.abc import Callable, Sequence

import msgspec

from reshard.comm.single import LocalBoard
from reshard.errors import CommunicationError, ReshardError
from tests.traced import Trace, stop_to_be_traced

SAVED, REFUSED, BROKEN = 0, 3, 4
"""How a process ended: with what it was to do; with an error that explains itself; with another one."""

# A rank that waits longer (seconds) for another one hangs.
_LIMIT = 30.0

_Links = list[dict[int, socket.socket]]


class SocketCommunicator:
    """Ranks that talk through rank 0. Who dies is heard of at once: its sockets close.

    Args:
        rank: this one.
        world_size: how many there are.
        links: of each communicator that there may be, the sockets to the others; the first is taken, the rest are for duplicates.
    """

    def __init__(self, rank: int, world_size: int, links: list[dict[int, socket.socket]]) -> None:
        self.rank, self.world_size = rank, world_size
        self._links, self._spare = links[0], links[1:]

    def all_gather(self, data: bytes) -> list[bytes]:
        try:
            if self.rank:
                _send(self._links[0], data)
                return msgspec.msgpack.decode(_receive(self._links[0]), type=list[bytes])
            gathered = [data] + [_receive(self._links[rank]) for rank in range(1, self.world_size)]
            for rank in range(1, self.world_size):
                _send(self._links[rank], msgspec.msgpack.encode(gathered))
            return gathered
        except OSError as error:
            raise CommunicationError("a rank is gone", rank=self.rank, found=str(error)) from error

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        return self.all_gather(data if self.rank == source else b"")[source]

    def barrier(self) -> None:
        self.all_gather(b"")

    def send(self, data: bytes | memoryview, target: int) -> None:
        raise CommunicationError("these ranks have collectives only", rank=self.rank)

    def recv(self, source: int) -> bytes:
        raise CommunicationError("these ranks have collectives only", rank=self.rank)

    def duplicate(self) -> SocketCommunicator:
        return SocketCommunicator(self.rank, self.world_size, self._spare)

    def board(self) -> LocalBoard:
        return LocalBoard(self.rank, {})

    def close(self) -> None:
        for link in self._links.values():
            link.close()


def _send(link: socket.socket, data: bytes) -> None:
    link.sendall(struct.pack("<Q", len(data)) + data)


def _receive(link: socket.socket) -> bytes:
    (length,) = struct.unpack("<Q", _exactly(link, 8))
    return _exactly(link, length)


def _exactly(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = link.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the other end is closed")
        data += part
    return data


def run_job(
    world_size: int, work: Callable[[SocketCommunicator], object], *, traced: int | None = None, trace: Trace | None = None
) -> list[int]:
    """Fork the ranks of a job; how each ended: an exit code, or the negative number of the signal that killed it.

    Args:
        world_size: how many ranks.
        work: what each does.
        traced: the rank whose system calls are traced; None for none.
        trace: what is done with them.
    """
    links: list[_Links] = [[{}, {}] for _ in range(world_size)]
    for rank in range(1, world_size):
        for number in (0, 1):
            links[0][number][rank], links[rank][number][0] = socket.socketpair()
    processes = [_fork(rank, links, work, stops=rank == traced) for rank in range(world_size)]
    _close(links, range(world_size))
    strace = None
    if traced is not None and trace is not None:
        os.waitpid(processes[traced], os.WUNTRACED)
        strace = trace.attach(processes[traced])
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if strace is not None:
        strace.communicate()
    return codes


def _fork(rank: int, links: list[_Links], work: Callable[[SocketCommunicator], object], *, stops: bool) -> int:
    process = os.fork()
    if process:
        return process
    code = BROKEN
    try:
        signal.alarm(int(2 * _LIMIT))  # whatever happens, it ends
        _close(links, [other for other in range(len(links)) if other != rank])
        if stops:
            stop_to_be_traced()
        for number in links[rank]:
            for link in number.values():
                link.settimeout(_LIMIT)
        work(SocketCommunicator(rank, len(links), links[rank]))
        code = SAVED
    except ReshardError:
        code = REFUSED
    except BaseException:  # noqa: BLE001 - nothing may return into the parent's code
        traceback.print_exc()
    finally:
        os._exit(code)


def _close(links: list[_Links], ranks: Sequence[int]) -> None:
    for rank in ranks:
        for number in links[rank]:
            for link in number.values():
                link.close()
