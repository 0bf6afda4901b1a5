"""Real ranks: processes with a gloo group between them, started once per world size and used by every test that needs them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# What the fork server imports once, so that each rank starts in well under a second instead of importing for some ten.
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "transformers.models.qwen3",
]


class RankFailedError(AssertionError):
    """A rank raised; the message has its traceback."""


class RankPool:
    """N processes, each a rank of one gloo group. `run` calls a function of an importable module on all of them."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        os.environ["OMP_NUM_THREADS"] = "1"
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pairs = [context.Pipe() for _ in range(self.world_size)]
        self._ends = [mine for mine, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(rank, self.world_size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
        """Call `function(*arguments)` on every rank; their results, in rank order.

        A rank that raises, dies or hangs fails the test, and the pool starts anew for the next one.
        """
        for end in self._ends:
            end.send((function, arguments))
        results: dict[int, Any] = {}
        failure = None
        while len(results) < self.world_size and failure is None:
            ready = wait([end for rank, end in enumerate(self._ends) if rank not in results], timeout)
            if not ready:
                failure = f"no word from ranks {sorted(set(range(self.world_size)) - set(results))} for {timeout:g} s"
            for end in ready:
                rank = self._ends.index(end)  # type: ignore[arg-type]
                try:
                    good, value = end.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, value = False, "the process died"
                if good:
                    results[rank] = value
                else:
                    failure = f"rank {rank}:\n{value}"
        if failure is not None:
            self.close()
            self._start()
            raise RankFailedError(failure)
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, world_size: int, port: int, end: Connection) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send((True, function(*arguments)))
        except BaseException:  # noqa: BLE001 - whatever it was, the test must see it
            end.send((False, traceback.format_exc()))
