"""The protocol between ranks."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


class Board(Protocol):
    """Where ranks leave short notices for each other: whoever wants looks, nobody waits. From any thread."""

    def post(self, topic: str, data: bytes, *, shared: bool = False) -> None:
        """Leave a notice of this rank, in the place of its last one under the topic; or, shared, in the one place that all ranks have
        in common, where whoever posts last is read.
        """
        ...

    def read(self, topic: str, rank: int | None) -> bytes | None:
        """A rank's last notice under a topic, or with None the shared one; None when there is none."""
        ...

    def read_all(self, topic: str, world_size: int) -> list[bytes | None]:
        """The last notices of all ranks under a topic, in rank order."""
        ...


@runtime_checkable
class Communicator(Protocol):
    """A group of ranks of its own; its traffic never meets training's collectives.

    Every method except `send` and `recv` is collective: each rank calls it, in the same order. Each raises CommunicationError when a
    rank is gone or a time limit is over.
    """

    @property
    def rank(self) -> int:
        """This process's global rank."""
        ...

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        ...

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes (of any lengths), in rank order."""
        ...

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        """The bytes of one rank, on every rank; what the others pass is ignored."""
        ...

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        ...

    def send(self, data: bytes | memoryview, target: int) -> None:
        """Give bytes to another rank; blocks at most until they are received. Pairs arrive in order."""
        ...

    def recv(self, source: int) -> bytes:
        """Wait for the next bytes of another rank."""
        ...

    def duplicate(self) -> Communicator:
        """Another one over the same ranks, whose traffic never meets this one's: for another thread. Collective."""
        ...

    def board(self) -> Board:
        """The ranks' notices; one board for all communicators of a job. Not collective."""
        ...

    def close(self) -> None:
        """Let go of the group. Not collective."""
        ...
