"""What the fork server imports before it forks ranks: everything that they need."""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import sys
from types import FrameType

importlib.import_module("reshard.training.worker")


def _is_fork_server() -> bool:
    return any("multiprocessing.forkserver" in part for part in sys.orig_argv)


def _end_at_once(server: int = os.getpid()) -> None:
    """End the fork server without taking torch apart, which costs more than a second while a pipe's reader waits; ranks end as usual."""
    if os.getpid() == server:
        os._exit(0)


def _leave_it_to_the_ranks(number: int, _: FrameType | None, server: int = os.getpid()) -> None:
    """A scheduler's SIGTERM goes to all processes of a job. The fork server must outlive its ranks, which save first: the launcher takes
    them for dead when it is gone. It ends with the launcher. A rank that was just forked does what the signal says.
    """
    if os.getpid() != server:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


if _is_fork_server():
    signal.signal(signal.SIGTERM, _leave_it_to_the_ranks)
    atexit.register(_end_at_once)
