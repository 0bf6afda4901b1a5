"""The communicator of a run with one rank."""

from __future__ import annotations

from reshard.errors import CommunicationError


class LocalBoard:
    """The notices of ranks that are threads of one process.

    Args:
        rank: whose notices are posted.
        notices: of all ranks, by topic and rank (None: the shared one); they share it.
    """

    def __init__(self, rank: int, notices: dict[tuple[str, int | None], bytes]) -> None:
        self._rank = rank
        self._notices = notices

    def post(self, topic: str, data: bytes, *, shared: bool = False) -> None:
        self._notices[topic, None if shared else self._rank] = data

    def read(self, topic: str, rank: int | None) -> bytes | None:
        return self._notices.get((topic, rank))

    def read_all(self, topic: str, world_size: int) -> list[bytes | None]:
        return [self.read(topic, rank) for rank in range(world_size)]


class SingleProcess:
    """One rank, alone."""

    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self._notices: dict[tuple[str, int | None], bytes] = {}

    def all_gather(self, data: bytes) -> list[bytes]:
        return [bytes(data)]

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        return bytes(data)

    def barrier(self) -> None:
        return None

    def send(self, data: bytes | memoryview, target: int) -> None:
        raise CommunicationError("a single process has nobody to send to", rank=0, found=f"target {target}")

    def recv(self, source: int) -> bytes:
        raise CommunicationError("a single process has nobody to hear from", rank=0, found=f"source {source}")

    def duplicate(self) -> SingleProcess:
        return self

    def board(self) -> LocalBoard:
        return LocalBoard(0, self._notices)

    def close(self) -> None:
        return None
