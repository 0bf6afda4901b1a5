"""Signs of life help to name a rank that is lost; they never keep one from its work."""

from __future__ import annotations

import threading

import pytest

from reshard.comm import SingleProcess
from reshard.comm.heartbeat import lost_ranks_named


class Notes:
    """A board that keeps nothing."""

    def post(self, topic: str, data: bytes, *, shared: bool = False) -> None:
        pass

    def read(self, topic: str, rank: int | None) -> bytes | None:
        return None

    def read_all(self, topic: str, world_size: int) -> list[bytes | None]:
        return [None] * world_size


class OneOfTwo(SingleProcess):
    world_size = 2

    def board(self) -> Notes:  # type: ignore[override]
        return Notes()


def test_a_rank_without_a_thread_for_them_does_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def refuse(thread: threading.Thread) -> None:
        refused.append(thread.name)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = []
    with lost_ranks_named(OneOfTwo()):
        done.append(True)
    assert done == [True]
    assert refused == ["reshard-heartbeat"]
