"""Run a function on N simulated ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from reshard.comm.simulated import DEFAULT_TIMEOUT, SimulatedCluster, SimulatedCommunicator
from reshard.errors import CommunicationError

T = TypeVar("T")


def run_ranks(world_size: int, function: Callable[[SimulatedCommunicator], T], timeout: float = DEFAULT_TIMEOUT) -> list[T]:
    """Call `function(communicator)` on every rank of a simulated cluster.

    Args:
        world_size: the number of ranks, each a thread.
        function: what each rank does.
        timeout: seconds after which a rank that waits for another gives up.

    Returns:
        The ranks' results, in rank order.

    Raises:
        BaseException: the first error that a rank raised by itself (not because another was gone). A rank that fails wakes the others.
    """
    outcomes = run_ranks_settled(world_size, function, timeout)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if errors:
        raise next((error for error in errors if not isinstance(error, CommunicationError)), errors[0])
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


def run_ranks_settled(
    world_size: int, function: Callable[[SimulatedCommunicator], T], timeout: float = DEFAULT_TIMEOUT
) -> list[T | BaseException]:
    """As `run_ranks`, but each rank's error stands in the place of its result."""
    cluster = SimulatedCluster(world_size, timeout)
    results: list[T | BaseException] = [CommunicationError("the rank did not finish")] * world_size

    def work(rank: int) -> None:
        try:
            results[rank] = function(cluster.communicator(rank))
        except BaseException as error:  # noqa: BLE001 - a simulated death is one, and is what the caller wants to see
            results[rank] = error
            cluster.abort()

    if world_size == 1:
        work(0)
        return results
    threads = [threading.Thread(target=work, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
