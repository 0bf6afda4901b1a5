"""Ranks talk over sockets of their own: for frameworks whose collectives can't be used beside training, or from another thread.

Each process listens at one address, which all others learn when it joins. Whoever has something to say to another connects to it, once
for each communicator, and proves that it knows the job's key. Collectives go up and down a tree, so that no rank talks to all. A rank that
can't go on closes its connections, and so on: all hear of it at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import TypeVar

import msgspec

from reshard.comm.communicator import Board
from reshard.comm.notices import BoardClient, BoardServer
from reshard.errors import CommunicationError

T = TypeVar("T")

Address = tuple[str, int]

# A rank hears from so many others, and tells so many, in a collective: a job of 16,384 ranks is five levels deep.
_FAN_OUT = 8

# The system counts what waits to be accepted: all of a large job may connect to rank 0 at once.
_BACKLOG = 4096

_LINES = "lines"
_BOARD = "board"


class Endpoint:
    """Where one process listens, and its connections with others.

    Args:
        rank: this process's.
        world_size: the number of ranks.
        host: the address of this machine under which the others reach it.
        key: what only the processes of this job know.
        timeout: seconds that an answer may take.
    """

    def __init__(self, rank: int, world_size: int, host: str, key: bytes, timeout: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.table: list[Address] = []
        self.notices = BoardServer()
        self.board: Board = self.notices.board_of(rank)
        self._key = key
        self._incoming: dict[tuple[str, int], Connection] = {}
        self._outgoing: dict[tuple[str, int], Connection] = {}
        self._changed = threading.Condition()
        self._users = 0
        try:
            self._listener = Listener((host, 0), "AF_INET", backlog=_BACKLOG)
        except OSError as error:
            raise CommunicationError("a rank can't listen for the others", rank=rank, found=f"{host}: {error}") from error
        address = self._listener.address
        assert isinstance(address, tuple)
        self.address: Address = (str(address[0]), int(address[1]))
        threading.Thread(target=self._accept, name="reshard-listener", daemon=True).start()

    def join(self, first: Address) -> None:
        """Learn where all ranks listen. Collective.

        Args:
            first: where rank 0 listens.

        Raises:
            CommunicationError: a rank doesn't come in time.
        """
        if self.rank == 0:
            told = [(source, msgspec.msgpack.decode(self._hear("join", source), type=Address)) for source in range(1, self.world_size)]
            self.table = [self.address, *(address for _, address in told)]
        else:
            self.table = [first] * self.world_size
            try:
                self.outgoing("join", 0).send_bytes(msgspec.msgpack.encode(self.address))
            except (EOFError, OSError) as error:
                raise CommunicationError("a rank could not join the others", rank=self.rank, found=str(error)) from error
        above, below = _neighbours(self.rank, self.world_size)
        data = self._hear("table", above) if self.rank else msgspec.msgpack.encode(self.table)
        self.table = msgspec.msgpack.decode(data, type=list[Address])  # before it is passed on: it says where to
        for rank in below:
            self.outgoing("table", rank).send_bytes(data)
        if self.rank:
            # While all are there: who ends first may be the one that keeps the notices.
            self.board = BoardClient(self.outgoing(_BOARD, 0), self.rank, self.timeout)
        for line in ("join", "table"):
            self.hang_up(line)

    def outgoing(self, line: str, target: int) -> Connection:
        """The connection on which this rank talks to another."""
        with self._changed:
            connection = self._outgoing.get((line, target))
        if connection is None:
            connection = Client(self.table[target])
            try:
                answer_challenge(connection, self._key)
                deliver_challenge(connection, self._key)
            except AuthenticationError as error:
                connection.close()
                raise ConnectionError(f"rank {target} is of another job: {error}") from error
            connection.send_bytes(msgspec.msgpack.encode((line, self.rank)))
            with self._changed:
                self._outgoing[line, target] = connection
        return connection

    def incoming(self, line: str, source: int) -> Connection:
        """The connection on which another rank talks to this one: waits until it has called.

        Raises:
            TimeoutError: it doesn't.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: (line, source) in self._incoming, self.timeout):
                raise TimeoutError(f"rank {source} did not call within {self.timeout:g} s")
            return self._incoming[line, source]

    def hang_up(self, line: str) -> None:
        """Close all connections of a line: whoever waits there hears so."""
        with self._changed:
            for connections in (self._incoming, self._outgoing):
                for name in [name for name in connections if name[0] == line]:
                    with contextlib.suppress(OSError):
                        connections.pop(name).close()

    def use(self) -> None:
        """Somebody more needs this endpoint."""
        self._users += 1

    def leave(self) -> None:
        """Somebody less needs it; the last one closes it. Notices can be left and read on as long as their keeper's process lives."""
        self._users -= 1
        if self._users == 0:
            with contextlib.suppress(OSError):
                self._listener.close()

    def _hear(self, line: str, source: int) -> bytes:
        try:
            connection = self.incoming(line, source)
            if not connection.poll(self.timeout):
                raise TimeoutError(f"rank {source} said nothing within {self.timeout:g} s")
            return connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise CommunicationError("a rank did not join the others", rank=source, found=str(error) or type(error).__name__) from error

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:  # closed
                return
            # In a thread of its own: a stranger that never answers keeps nobody waiting.
            threading.Thread(target=self._receive, args=(connection,), name="reshard-caller", daemon=True).start()

    def _receive(self, connection: Connection) -> None:
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            line, source = msgspec.msgpack.decode(connection.recv_bytes(), type=tuple[str, int])
        except (AuthenticationError, EOFError, OSError, msgspec.MsgspecError):  # a stranger
            connection.close()
            return
        if line == _BOARD:
            self.notices.serve(connection, source)
            return
        with self._changed:
            self._incoming[line, source] = connection
            self._changed.notify_all()


def _neighbours(rank: int, world_size: int) -> tuple[int, range]:
    """The rank above one in the tree (rank 0 has none), and those below it."""
    first = _FAN_OUT * rank + 1
    return (rank - 1) // _FAN_OUT, range(first, min(first + _FAN_OUT, world_size))


class SocketCommunicator:
    """All ranks of a job, over the connections of an endpoint that has joined.

    Args:
        endpoint: this process's.
        line: the name of the communicator's connections, the same on all ranks.
    """

    def __init__(self, endpoint: Endpoint, line: str = _LINES) -> None:
        self._endpoint = endpoint
        self._line = line
        self._duplicates = 0
        self._state = "open"
        self.rank: int = endpoint.rank
        self.world_size: int = endpoint.world_size
        self._above, self._below = _neighbours(self.rank, self.world_size)
        endpoint.use()

    def all_gather(self, data: bytes) -> list[bytes]:
        return self._try("gather", lambda: self._all_gather(bytes(data)))

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        if source == 0:
            return self._try("broadcast", lambda: self.tell_down(bytes(data)))
        gathered = self._try("broadcast", lambda: self._all_gather(bytes(data) if self.rank == source else b""))
        return gathered[source]

    def barrier(self) -> None:
        self._try("wait for each other", lambda: self._all_gather(b""))

    def send(self, data: bytes | memoryview, target: int) -> None:
        self._check_peer(target)
        flat = data.cast("B") if isinstance(data, memoryview) else data
        self._try(f"send to rank {target}", lambda: self._say("pairs", target, flat))

    def recv(self, source: int) -> bytes:
        self._check_peer(source)
        return self._try(f"hear from rank {source}", lambda: self._hear("pairs", source))

    def duplicate(self) -> SocketCommunicator:
        self._duplicates += 1
        return SocketCommunicator(self._endpoint, f"{self._line}.{self._duplicates}")

    def board(self) -> Board:
        return self._endpoint.board

    def close(self) -> None:
        if self._state != "closed":
            self._hang_up()
            self._state = "closed"
            self._endpoint.leave()

    def tell_down(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        if self.rank:
            data = self._hear("tree", self._above)
        for rank in self._below:
            self._say("tree", rank, data)
        return data

    def _all_gather(self, data: bytes) -> list[bytes]:
        parts = {self.rank: data}
        for rank in self._below:
            parts.update(msgspec.msgpack.decode(self._hear("tree", rank), type=dict[int, bytes]))
        if self.rank:
            self._say("tree", self._above, msgspec.msgpack.encode(parts))
        told = msgspec.msgpack.decode(self.tell_down(msgspec.msgpack.encode(parts)), type=dict[int, bytes])
        return [told[rank] for rank in range(self.world_size)]

    def _say(self, way: str, target: int, data: bytes | memoryview) -> None:
        self._endpoint.outgoing(f"{self._line}/{way}", target).send_bytes(data)

    def _hear(self, way: str, source: int) -> bytes:
        connection = self._endpoint.incoming(f"{self._line}/{way}", source)
        if not connection.poll(self._endpoint.timeout):
            raise TimeoutError(f"rank {source} said nothing within {self._endpoint.timeout:g} s")
        return connection.recv_bytes()

    def _check_peer(self, rank: int) -> None:
        if rank == self.rank or not 0 <= rank < self.world_size:
            raise CommunicationError(
                "no such rank to talk to", rank=self.rank, found=f"rank {rank}", expected=f"another of {self.world_size}"
            )

    def _try(self, what: str, action: Callable[[], T]) -> T:
        if self._state != "open":
            raise CommunicationError(f"ranks could not {what}", rank=self.rank, found=f"this communicator is {self._state}")
        try:
            return action()
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            self._break_off()
            raise CommunicationError(
                f"ranks could not {what}",
                rank=self.rank,
                found=str(error) or "a connection ended",
                fix="look at the other ranks' messages first: one of them may have ended; then start the run again",
            ) from error
        except BaseException:
            # Interrupted: what it didn't take would be taken for the answer of another collective.
            self._break_off()
            raise

    def _break_off(self) -> None:
        self._state = "broken"
        try:
            self._hang_up()
        except KeyboardInterrupt:
            self._hang_up()  # all the same: the others would wait
            raise

    def _hang_up(self) -> None:
        for way in ("tree", "pairs"):
            self._endpoint.hang_up(f"{self._line}/{way}")
