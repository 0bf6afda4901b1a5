"""Signals as something that a thread can wait for."""

from __future__ import annotations

import os
import select
import signal
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from reshard.errors import UsageError


class SignalPipe:
    """Catches signals, and gives them to whoever waits.

    Python runs a handler only when the main thread comes back to Python, which one that waits for another rank doesn't do. So the byte that
    the interpreter writes at once, wherever its main thread is, is what counts (`signal.set_wakeup_fd`).

    Args:
        signals: which; none: `wake` still ends a wait.

    Attributes:
        handled: those of which the main thread knows by itself, without waiting.

    Raises:
        UsageError: they can't be caught here.
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        if signals and threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "signals can only be caught in the main thread",
                field="signals",
                found=f"thread {threading.current_thread().name}",
                fix="make it in the main thread, or give signals=() and call request() from there",
            )
        self._signals = tuple(signals)
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._before: dict[signal.Signals, Any] = {}
        self.handled: set[signal.Signals] = set()
        self._wakeup = -1
        if signals:
            self._install()

    def _install(self) -> None:
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if self._wakeup != -1:
            # An event loop is here already. Its main thread comes back to Python whenever a signal wakes it.
            signal.set_wakeup_fd(self._wakeup)
        for number in self._signals:
            self._before[number] = signal.signal(number, self._caught)
        # Who is forked has the pipe and the handlers too; signals to a child are none of ours.
        forget = weakref.WeakMethod(self._forget)
        os.register_at_fork(after_in_child=lambda: (method := forget()) and method())

    def wait(self, seconds: float) -> set[signal.Signals]:
        """Wait until a signal comes, somebody calls `wake`, or the time is over; the signals that came."""
        ready, _, _ = select.select([self._read], [], [], seconds)
        came = os.read(self._read, 4096) if ready else b""
        return {number for number in self._signals if number in came}

    def wake(self) -> None:
        """End a wait."""
        with suppress(BlockingIOError):  # a full pipe wakes, too
            os.write(self._write, b"\0")

    def close(self) -> None:
        """Give the signals back to whoever had them. In the thread that made this."""
        self._restore()
        os.close(self._read)
        os.close(self._write)

    def _caught(self, number: int, _: FrameType | None) -> None:
        self.handled.add(signal.Signals(number))
        with suppress(BlockingIOError):
            os.write(self._write, bytes([number]))

    def _restore(self) -> None:
        if self._before and self._wakeup == -1:
            signal.set_wakeup_fd(-1)
        for number, before in self._before.items():
            # None: a handler that Python doesn't know of, and can't put back.
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def _forget(self) -> None:
        if self._before:
            self._restore()
