"""Work that several threads take from one supply."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from reshard.loading.workers import run_all


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_piece_is_done_once(threads: int) -> None:
    def works() -> Iterator[Callable[[], int]]:
        yield from ((lambda number=number: number) for number in range(1000))

    assert sorted(run_all(works(), threads, "test")) == list(range(1000))


def test_pieces_are_done_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=60)
    assert run_all(iter([meeting.wait] * 3), 3, "test")


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_ends_the_work(threads: int) -> None:
    begun: list[int] = []

    def piece(number: int) -> None:
        begun.append(number)
        if number == 10:
            raise ValueError("piece 10")

    def works() -> Iterator[Callable[[], None]]:
        yield from ((lambda number=number: piece(number)) for number in range(100_000))

    with pytest.raises(ValueError, match="piece 10"):
        run_all(works(), threads, "test")
    assert len(begun) < 100_000
    assert not [thread for thread in threading.enumerate() if thread.name == "test"]


@pytest.mark.parametrize("threads", [1, 3])
def test_what_makes_the_pieces_may_fail(threads: int) -> None:
    done: list[int] = []

    def works() -> Iterator[Callable[[], None]]:
        yield from ((lambda number=number: done.append(number)) for number in range(10))
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        run_all(works(), threads, "test")
    assert sorted(done) == list(range(10))


def test_pieces_under_way_end_before_the_error_is_raised() -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        assert not ended.wait(0.2)
        ended.set()

    def broken() -> None:
        assert begun.wait(60)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run_all(iter([slow, broken]), 2, "test")
    assert ended.is_set()


def test_where_no_thread_can_be_had_the_caller_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert sorted(run_all(iter([lambda: 1, lambda: 2, lambda: 3]), 3, "test")) == [1, 2, 3]
