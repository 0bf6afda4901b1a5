"""The communicator of a run with one rank."""

from __future__ import annotations

from reshard.errors import CommunicationError


class SingleProcess:
    """One rank, alone."""

    rank = 0
    world_size = 1

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

    def close(self) -> None:
        return None
