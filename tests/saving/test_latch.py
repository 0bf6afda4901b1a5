"""What is set once, whatever comes between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count

import pytest

from reshard.saving import latch
from reshard.saving.latch import Latch
from tests.interrupts import interrupted_at


def test_who_waits_is_let_go_when_it_is_set_and_ever_after() -> None:
    it = Latch()
    assert not it.is_set
    assert not it.wait(0)
    told: list[bool] = []
    waiting = [threading.Thread(target=lambda: told.append(it.wait(60))) for _ in range(3)]
    for thread in waiting:
        thread.start()
    it.set()
    for thread in waiting:
        thread.join(60)
    assert told == [True, True, True]
    assert it.is_set
    assert it.wait()
    it.set()


def interrupted(point: int, use: Callable[[Latch], object]) -> bool:
    it = Latch()
    came = interrupted_at(point, lambda: use(it), [latch, threading])
    waiting = threading.Thread(target=it.wait, daemon=True)
    waiting.start()
    it.set()
    waiting.join(60)
    assert not waiting.is_alive()
    return came


@pytest.mark.parametrize("use", [Latch.set, lambda it: it.wait(0)], ids=["set", "wait"])
def test_an_interrupt_while_it_is_set_or_waited_for_holds_nobody_else(use: Callable[[Latch], object]) -> None:
    points = next(point for point in count(1) if not interrupted(point, use))
    assert points > 2
