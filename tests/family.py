"""Processes and what descends from them. Msrun gives each of its ranks a session of its own, so that no signal to a group reaches all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def family_of(leader: int) -> set[int]:
    """A process and what descends from it, as far as the kernel knows it now."""
    members, more = {leader}, {leader}
    while more:
        more = {child for pid in more for child in _children(pid)} - members
        members |= more
    return members


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def alive(pids: Iterable[int]) -> set[int]:
    """Those that run; who is dead and not waited for doesn't."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.add(pid)
    return found


def gone(pids: Iterable[int], seconds: float = 60) -> bool:
    """Whether all of them end within a time."""
    deadline = time.monotonic() + seconds
    while alive(pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def end(pids: Iterable[int]) -> None:
    """SIGKILL to all that run."""
    for pid in alive(pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
