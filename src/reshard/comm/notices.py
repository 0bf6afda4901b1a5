"""The board of a job whose ranks talk over sockets: rank 0 keeps the notices, the others ask."""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection

import msgspec

from reshard.comm.single import LocalBoard
from reshard.errors import CommunicationError

_Question = tuple[str, list[int | None], bytes | None]
"""A topic, of which ranks (None: the shared notice), and what to leave there; None to read."""


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
                topic, places, data = msgspec.msgpack.decode(connection.recv_bytes(), type=_Question)
                if data is not None:
                    for place in places:
                        self._notices[topic, place] = data
                connection.send_bytes(msgspec.msgpack.encode([] if data is not None else [self._notices.get((topic, p)) for p in places]))
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

    def post(self, topic: str, data: bytes, *, shared: bool = False) -> None:
        self._ask((topic, [None if shared else self._rank], data))

    def read(self, topic: str, rank: int | None) -> bytes | None:
        return self._ask((topic, [rank], None))[0]

    def read_all(self, topic: str, world_size: int) -> list[bytes | None]:
        return self._ask((topic, list(range(world_size)), None))

    def _ask(self, question: _Question) -> list[bytes | None]:
        try:
            with self._turn:
                self._connection.send_bytes(msgspec.msgpack.encode(question))
                if not self._connection.poll(self._timeout):
                    raise TimeoutError(f"no answer within {self._timeout:g} s")
                return msgspec.msgpack.decode(self._connection.recv_bytes(), type=list[bytes | None])
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            raise CommunicationError(
                "the job's notices can't be reached",
                rank=self._rank,
                found=str(error) or "the connection ended",
                fix="look at rank 0 and the launcher: one of them has ended",
            ) from error
        except BaseException:
            # Interrupted: an answer that wasn't taken would be taken for that of the next question.
            self._connection.close()
            raise
