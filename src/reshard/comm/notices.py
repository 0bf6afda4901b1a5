"""The board of a job whose ranks talk over sockets: rank 0 keeps the notices, the others ask."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection

import msgspec

from reshard.comm.single import LocalBoard
from reshard.errors import CommunicationError

_Question = tuple[int, str, list[int | None], bytes | None]
"""Its number, a topic, of which ranks (None: the shared notice), and what to leave there; None to read."""

_Answer = tuple[int, list[bytes | None]]
"""The question's number, and what was read."""


class BoardServer:
    """The notices, in the process of rank 0."""

    def __init__(self) -> None:
        self._notices: dict[tuple[str, int | None], bytes] = {}

    def board_of(self, rank: int) -> LocalBoard:
        """The board of a rank in this process."""
        return LocalBoard(rank, self._notices)

    def serve(self, connection: Connection, rank: int) -> None:
        """Answer a rank's questions until it hangs up."""
        try:
            while True:
                number, topic, places, data = msgspec.msgpack.decode(connection.recv_bytes(), type=_Question)
                if data is not None:
                    for place in places:
                        self._notices[topic, place] = data
                read = [] if data is not None else [self._notices.get((topic, place)) for place in places]
                connection.send_bytes(msgspec.msgpack.encode((number, read)))
        except (EOFError, OSError, msgspec.MsgspecError):
            connection.close()


class BoardClient:
    """The board of another rank.

    Args:
        connection: to rank 0, which serves it.
        rank: whose notices are posted.
        timeout: seconds that an answer may take.
    """

    def __init__(self, connection: Connection, rank: int, timeout: float) -> None:
        self._connection = connection
        self._rank = rank
        self._timeout = timeout
        self._turn = threading.Lock()
        self._asked = 0

    def post(self, topic: str, data: bytes, *, shared: bool = False) -> None:
        self._ask(topic, [None if shared else self._rank], data)

    def read(self, topic: str, rank: int | None) -> bytes | None:
        return self._ask(topic, [rank], None)[0]

    def read_all(self, topic: str, world_size: int) -> list[bytes | None]:
        return self._ask(topic, list(range(world_size)), None)

    def _ask(self, topic: str, places: list[int | None], data: bytes | None) -> list[bytes | None]:
        try:
            with self._turn:
                self._asked += 1
                self._connection.send_bytes(msgspec.msgpack.encode((self._asked, topic, places, data)))
                while True:
                    if not self._connection.poll(self._timeout):
                        raise TimeoutError(f"no answer within {self._timeout:g} s")
                    number, read = msgspec.msgpack.decode(self._connection.recv_bytes(), type=_Answer)
                    # Whoever was interrupted has left an answer behind.
                    if number == self._asked:
                        return read
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            raise CommunicationError(
                "the job's notices can't be reached",
                rank=self._rank,
                found=str(error) or "the connection ended",
                fix="look at rank 0 and the launcher: one of them has ended",
            ) from error
