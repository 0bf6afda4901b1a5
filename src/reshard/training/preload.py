"""What the fork server imports before it forks ranks: everything that they need."""

from __future__ import annotations

import atexit
import importlib
import os
import sys

importlib.import_module("reshard.training.worker")


def _is_fork_server() -> bool:
    return any("multiprocessing.forkserver" in part for part in sys.orig_argv)


def _end_at_once(server: int = os.getpid()) -> None:
    """End the fork server without taking torch apart, which costs more than a second while a pipe's reader waits; ranks end as usual."""
    if os.getpid() == server:
        os._exit(0)


if _is_fork_server():
    atexit.register(_end_at_once)
