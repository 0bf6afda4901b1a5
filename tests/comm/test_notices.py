"""The board over sockets: what is left there is what is read, also by who was interrupted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from typing import Any

import pytest

from reshard.comm.notices import BoardClient, BoardServer
from reshard.errors import CommunicationError


@pytest.fixture
def client() -> Iterator[BoardClient]:
    """Rank 1's board, which a thread serves."""
    mine, theirs = Pipe()
    server = BoardServer()
    serving = threading.Thread(target=server.serve, args=(theirs, 1), daemon=True)
    serving.start()
    yield BoardClient(mine, 1, 60.0)
    mine.close()
    serving.join(60)


def test_an_answer_that_an_interrupt_left_behind_is_not_taken_for_another(client: BoardClient, monkeypatch: pytest.MonkeyPatch) -> None:
    client.post("first", b"1")
    client.post("second", b"2")
    assert client.read("first", 1) == b"1"

    def interrupt(*_: object) -> Any:
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(client._connection, "poll", interrupt)
            with pytest.raises(KeyboardInterrupt):
                client.read("first", 1)
    assert client.read("second", 1) == b"2"
    assert client.read_all("first", 3) == [None, b"1", None]


def test_notices_that_cannot_be_reached_are_said_to_be_so(client: BoardClient) -> None:
    client._connection.close()
    with pytest.raises(CommunicationError, match="the job's notices can't be reached"):
        client.read("first", 1)
