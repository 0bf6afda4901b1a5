"""Ranks over sockets: trees deeper than one level, strangers, and ranks that go."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from reshard.comm.sockets import Endpoint, SocketCommunicator
from reshard.errors import CommunicationError

KEY = b"k" * 32


def run(size: int, work: Callable[[SocketCommunicator], Any], timeout: float = 20.0, key: bytes = KEY) -> list[Any]:
    """Each rank in a thread, with an endpoint of its own."""
    first = Endpoint(0, size, "127.0.0.1", KEY, timeout)
    outcomes: list[Any] = [None] * size

    def rank(number: int) -> None:
        try:
            endpoint = first if number == 0 else Endpoint(number, size, "127.0.0.1", KEY if number < size - 1 else key, timeout)
            comm = SocketCommunicator(endpoint)
            endpoint.join(first.address)
            try:
                outcomes[number] = work(comm)
            finally:
                comm.close()
        except CommunicationError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes


def test_a_tree_of_several_levels() -> None:
    size = 12

    def work(comm: SocketCommunicator) -> bool:
        rows = [bytes([rank]) * rank for rank in range(size)]
        comm.board().post("topic", bytes([comm.rank]))
        other = comm.duplicate()
        assert comm.all_gather(rows[comm.rank]) == rows
        assert other.broadcast(rows[comm.rank], 5) == rows[5]
        assert comm.broadcast(rows[comm.rank]) == rows[0]
        comm.send(memoryview(b"abc"), (comm.rank + 1) % size)
        assert comm.recv((comm.rank - 1) % size) == b"abc"
        comm.barrier()
        assert comm.board().read_all("topic", size) == [bytes([rank]) for rank in range(size)]
        comm.barrier()
        other.close()
        return True

    assert run(size, work) == [True] * size


@pytest.mark.parametrize("victim", [0, 2])
def test_an_interrupt_breaks_it_off_for_all(victim: int) -> None:
    """Nobody takes an answer for that of another collective."""

    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    def work(comm: SocketCommunicator) -> str:
        heard: list[list[bytes]] = []
        comm.barrier()
        if comm.rank == victim:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(comm, "tell_down", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    comm.all_gather(bytes([0]))
        else:
            with pytest.raises(CommunicationError, match="could not gather"):
                heard.extend(comm.all_gather(bytes([number])) for number in range(3))
            assert heard == [[bytes([number])] * 4 for number in range(len(heard))]
        with pytest.raises(CommunicationError, match="broken"):
            comm.all_gather(b"second")
        return "heard"

    assert run(4, work, timeout=50.0) == ["heard"] * 4


def test_a_second_interrupt_leaves_it_broken_off_all_the_same() -> None:
    """It comes while the first one's connections are being ended."""

    def work(comm: SocketCommunicator) -> str:
        hang_up, strikes = comm._hang_up, iter([True])

        def interrupt(*_: object) -> bytes:
            raise KeyboardInterrupt

        def hang_up_at_last() -> None:
            if next(strikes, False):
                raise KeyboardInterrupt
            hang_up()

        comm.barrier()
        if comm.rank == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(comm, "tell_down", interrupt)
                patch.setattr(comm, "_hang_up", hang_up_at_last)
                with pytest.raises(KeyboardInterrupt):
                    comm.all_gather(b"first")
        else:
            heard: list[list[bytes]] = []
            with pytest.raises(CommunicationError, match="could not gather"):
                heard.extend(comm.all_gather(b"first") for _ in range(3))
        with pytest.raises(CommunicationError, match="broken"):
            comm.all_gather(b"second")
        return "heard"

    assert run(3, work, timeout=50.0) == ["heard"] * 3


def test_all_hear_at_once_of_a_rank_that_goes() -> None:
    began = time.monotonic()

    def work(comm: SocketCommunicator) -> Any:
        comm.barrier()
        if comm.rank == 2:
            return "gone"  # its connections end with it
        with pytest.raises(CommunicationError, match="could not gather"):
            comm.all_gather(b"x")
        with pytest.raises(CommunicationError, match="broken"):
            comm.barrier()
        return "heard"

    assert run(4, work, timeout=50.0) == ["heard", "heard", "gone", "heard"]
    assert time.monotonic() - began < 45, "nobody waited for the time limit"


def test_a_rank_that_says_nothing_is_missed_in_time() -> None:
    is_missed = threading.Event()

    def silent(comm: SocketCommunicator) -> Any:
        comm.send(b"x", 1 - comm.rank)
        comm.recv(1 - comm.rank)
        if comm.rank == 1:
            is_missed.wait(60)
            return None
        comm._endpoint.timeout = 0.5
        with pytest.raises(CommunicationError, match=r"rank 1 said nothing within 0.5 s"):
            comm.recv(1)
        is_missed.set()
        return None

    assert run(2, silent, timeout=50.0) == [None, None]


def test_who_isnt_of_the_job_is_not_heard() -> None:
    endpoint = Endpoint(0, 2, "127.0.0.1", KEY, 1.0)
    with socket.create_connection(endpoint.address) as stranger:
        stranger.sendall(b"\0\0\0\4what")
        outcomes = run(2, lambda comm: comm.all_gather(b"x"))
        assert outcomes == [[b"x", b"x"]] * 2
    wrong = run(2, lambda comm: comm.barrier(), timeout=1.0, key=b"z" * 32)
    assert isinstance(wrong[0], CommunicationError)
    endpoint.use()
    endpoint.leave()


def test_wrong_peers() -> None:
    def work(comm: SocketCommunicator) -> None:
        for wrong in (comm.rank, 2, -1):
            with pytest.raises(CommunicationError, match="no such rank"):
                comm.send(b"", wrong)
        comm.barrier()

    assert run(2, work) == [None, None]
