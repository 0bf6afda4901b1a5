"""Real ranks: processes with a gloo group between them, started once per world size and used by every test that needs them."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.traced import let_all_trace

# What the fork server imports once, so that each rank starts in well under a second instead of importing for some ten.
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "transformers.models.qwen3",
]


@dataclass(frozen=True)
class Failure:
    """How a rank failed: a traceback, or that it died, and with which exit code."""

    text: str


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
        pairs = [context.Pipe() for _ in range(self.world_size)]
        self._ends = [mine for mine, _ in pairs]
        self._processes = [
            context.Process(target=_serve, args=(rank, self.world_size, theirs), daemon=True) for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()
        # Rank 0 says where it listens: a port that is looked for before may be another process's when it is taken.
        port = self._ends[0].recv()
        for end in self._ends[1:]:
            end.send(port)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
        """Call `function(*arguments)` on every rank; their results, in rank order.

        A rank that raises, dies or hangs fails the test, and the pool starts anew for the next one.
        """
        outcomes = self._call(function, arguments, timeout, keep_going=False)
        for rank, outcome in outcomes.items():
            if isinstance(outcome, Failure):
                self.restart()
                raise RankFailedError(f"rank {rank}:\n{outcome.text}")
        return [outcomes[rank] for rank in range(self.world_size)]

    def run_settled(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
        """As `run`, but each rank's `Failure` stands in the place of its result, and the pool is as the ranks left it.

        Whoever lets one die calls `restart`.
        """
        outcomes = self._call(function, arguments, timeout, keep_going=True)
        return [outcomes[rank] for rank in range(self.world_size)]

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float, *, keep_going: bool) -> dict[int, Any]:
        """What each rank gave, or how it failed; until all have, or the first failed."""
        for end in self._ends:
            end.send((function, arguments))
        outcomes: dict[int, Any] = {}
        while len(outcomes) < self.world_size:
            ready = wait([end for rank, end in enumerate(self._ends) if rank not in outcomes], timeout)
            if not ready:
                waited = Failure(f"no word for {timeout:g} s")
                return {**dict.fromkeys(range(self.world_size), waited), **outcomes}
            for end in ready:
                rank = self._ends.index(end)  # type: ignore[arg-type]
                try:
                    good, value = end.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join()
                    good, value = False, f"the process died, exit code {self._processes[rank].exitcode}"
                outcomes[rank] = value if good else Failure(value)
                if not good and not keep_going:
                    return outcomes
        return outcomes

    def restart(self) -> None:
        """End the processes and start others."""
        self.close()
        self._start()

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, world_size: int, end: Connection) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    let_all_trace()
    port = end.recv() if rank else 0
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, wait_for_workers=False)
    if rank == 0:
        end.send(store.port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send((True, function(*arguments)))
        except BaseException:  # noqa: BLE001 - whatever it was, the test must see it
            end.send((False, traceback.format_exc()))
