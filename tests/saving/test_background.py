"""Work beside its caller: begun once or not at all, and known of, wherever an interrupt comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest

from reshard.saving import background as module
from reshard.saving import latch
from reshard.saving.background import Background
from tests.interrupts import interrupted_at

SUBMIT: Callable[..., Any] = ThreadPoolExecutor.submit


@pytest.fixture
def background() -> Iterator[Background[int]]:
    """Runs pieces of work."""
    made: Background[int] = Background("test")
    yield made
    made.close()


def fail() -> int:
    raise ValueError("broken")


def test_the_result_stays_and_an_error_is_raised_once(background: Background[int]) -> None:
    assert background.wait() is None
    background.start(lambda: 3)
    assert background.wait() == 3
    assert background.wait() == 3
    background.start(fail)
    with pytest.raises(ValueError, match="broken"):
        background.wait()
    assert not background.is_busy
    assert background.wait() is None
    background.start(lambda: 4)
    assert background.wait() == 4


def test_what_was_begun_before_an_interrupt_is_waited_for(background: Background[int], monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        assert may_end.wait(60)
        return 1

    def submit(executor: ThreadPoolExecutor, function: Callable[[], object]) -> None:
        SUBMIT(executor, function)
        assert begun.wait(60)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ThreadPoolExecutor, "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            background.start(work)
    assert background.is_busy
    may_end.set()
    assert background.wait() == 1


def test_what_was_not_begun_before_an_interrupt_never_is(background: Background[int], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Callable[[], object]] = []
    done: list[int] = []

    def submit(executor: ThreadPoolExecutor, function: Callable[[], object]) -> None:
        given.append(function)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ThreadPoolExecutor, "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            background.start(lambda: done.append(1) or 1)
    assert not background.is_busy
    background.start(lambda: 2)
    given[0]()  # the thread comes to it
    assert background.wait() == 2
    assert done == []


def test_an_interrupt_anywhere_in_a_wait_keeps_nobody_from_waiting(background: Background[int]) -> None:
    def interrupted(point: int) -> bool:
        may_end, is_over = threading.Event(), threading.Event()
        background.start(lambda: int(may_end.wait(60)))
        piece = background._piece
        assert piece is not None

        def let_end() -> None:
            while not piece.over._waiting and not is_over.is_set():
                time.sleep(0.001)
            may_end.set()

        # Not before it is waited for: then there is nothing to wait for.
        helper = threading.Thread(target=let_end)
        helper.start()
        came = interrupted_at(point, background.wait, [module, latch])
        is_over.set()
        helper.join(60)
        background.wait()
        assert not background.is_busy
        return came

    assert next(point for point in count(1) if not interrupted(point)) > 4
