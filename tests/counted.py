"""A communicator whose calls are counted."""

from __future__ import annotations

from reshard.comm import Board, Communicator


class Counted:
    """Passes everything on to another one.

    Attributes:
        calls: the names of the methods that were called, in order; of its duplicates, too.
    """

    def __init__(self, inner: Communicator, calls: list[str] | None = None) -> None:
        self.inner = inner
        self.calls: list[str] = [] if calls is None else calls
        self.rank, self.world_size = inner.rank, inner.world_size

    def all_gather(self, data: bytes) -> list[bytes]:
        self.calls.append("all_gather")
        return self.inner.all_gather(data)

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        self.calls.append("broadcast")
        return self.inner.broadcast(data, source)

    def barrier(self) -> None:
        self.calls.append("barrier")
        self.inner.barrier()

    def send(self, data: bytes | memoryview, target: int) -> None:
        self.calls.append("send")
        self.inner.send(data, target)

    def recv(self, source: int) -> bytes:
        self.calls.append("recv")
        return self.inner.recv(source)

    def duplicate(self) -> Counted:
        return Counted(self.inner.duplicate(), self.calls)

    def board(self) -> Board:
        return self.inner.board()

    def close(self) -> None:
        self.inner.close()
