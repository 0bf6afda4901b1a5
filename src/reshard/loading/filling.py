"""Each rank fills its memory, and all hear how it went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import astuple

import msgspec
import numpy as np

from reshard.comm import Communicator
from reshard.comm.neighbours import Notice
from reshard.comm.together import attempt, settle
from reshard.geometry import Region
from reshard.loading.exchange import PreparedExchange, agree_on_exchange
from reshard.loading.handing import Handing, machines, prepare_handing
from reshard.loading.handover import read_direct, sum_up
from reshard.loading.lanes import Traffic, run_exchange
from reshard.loading.planned import PlannedLoad
from reshard.loading.reader import read_plan
from reshard.loading.report import RankReport
from reshard.loading.scales import converting
from reshard.state import Shard
from reshard.storage import Storage

_BROKE_OFF = "the load broke off; tensors of the run are partly overwritten"


class _Outcome(msgspec.Struct, array_like=True):
    """What a rank tells the others after it has read.

    Attributes:
        bytes_needed: as in `RankReport`, and so is `seconds`.
        seconds: see there.
        whole: the seconds from the begin of the load on.
        given: what it has handed to the other ranks of its machine, in bytes; None when it hasn't handed over anything.
        read: as in `Traffic`, and so are the others.
        verified: see there.
        pages: see there.
        sent: see there.
        received: see there.
    """

    bytes_needed: int
    seconds: dict[str, float]
    whole: float
    given: dict[int, int] | None
    read: int
    verified: int
    pages: int
    sent: int
    received: int


def fill_together(
    planned: PlannedLoad, notices: Sequence[Notice | None], comm: Communicator, storage: Storage, *, started: float, entered: float
) -> tuple[tuple[RankReport, ...], float, set[str]]:
    """Collective: every rank reads its part, or what all need is read once.

    Args:
        planned: by this rank.
        notices: of all ranks' doors.
        comm: the ranks.
        storage: where the checkpoint lies.
        started: when the load began, by `time.perf_counter`.
        entered: when this rank heard that all can load.

    Returns:
        What each rank did; the seconds that it took, from the begin of the load on until the last rank was done; and the names of tensors
        that turned up in files and that metadata doesn't list.

    Raises:
        ReshardError: whatever a rank met, the same on every rank.
        CommunicationError: a rank is gone.
    """
    unlisted: set[str] = set()
    groups = machines(notices)
    group = next((group for group in groups if comm.rank in group), None)
    with ExitStack() as opened:
        prepared = handing = error = None
        if planned.balanced:
            prepared, unlisted = agree_on_exchange(
                planned.wanted, planned.plan, planned.chosen, planned.headers, comm, planned.memory_budget, planned.catalog
            )
        elif planned.offer is not None and group is not None:
            offer = planned.offer
            handing, error = attempt(lambda: prepare_handing(offer, group, planned.chosen, planned.headers, comm.rank))
            if handing is not None:
                opened.enter_context(closing(handing))
        planning = planned.seconds["plan"] + time.perf_counter() - entered
        entered = time.perf_counter()
        traffic = _read_scales(planned, comm, storage)

        def tell() -> list[_Outcome]:
            seconds = {"open": planned.seconds["open"], "plan": planning, "read": time.perf_counter() - entered}
            needed = planned.plan.nbytes + (planned.scales.plan.nbytes if planned.scales is not None else 0)
            given = None if handing is None else dict(handing.given)
            outcome = _Outcome(needed, seconds, time.perf_counter() - started, given, *astuple(traffic))
            payloads = settle(comm, error, msgspec.msgpack.encode(outcome), what=_BROKE_OFF)
            return [msgspec.msgpack.decode(data, type=_Outcome) for data in payloads]

        if error is None:
            moved, error = attempt(lambda: _read(planned, prepared, handing, comm, storage))
            traffic = sum_up([traffic, moved or Traffic()])
        outcomes = tell()
        # On some machine some hand over and others don't: then nobody there has all that it counted on.
        if any(len({outcomes[rank].given is None for rank in group}) > 1 for group in groups):
            if handing is not None and any(outcomes[rank].given is None for rank in group or ()):
                left = handing
                moved, error = attempt(lambda: _read_alone(planned, left, storage))
                traffic = sum_up([traffic, moved or Traffic()])
            outcomes = tell()
    received = [one.received for one in outcomes]
    for one in outcomes:
        for rank, nbytes in (one.given or {}).items():
            received[rank] += nbytes
    reports = tuple(
        RankReport(rank, one.bytes_needed, one.read, one.seconds, one.sent, received[rank], one.verified, one.pages)
        for rank, one in enumerate(outcomes)
    )
    return reports, max(one.whole for one in outcomes), unlisted


def _read(
    planned: PlannedLoad, prepared: PreparedExchange | None, handing: Handing | None, comm: Communicator, storage: Storage
) -> Traffic:
    """Fill this rank's memory, balanced or by itself."""
    plan, directory, budget, verify = planned.plan, planned.catalog.directory, planned.memory_budget, planned.verify
    for shard, value in planned.fills:
        _fill(shard, value)
    memory = converting(planned.state, plan.cast, planned.scales)
    if prepared is None:
        traffic = read_direct(plan, planned.entries, handing, memory, storage, directory, memory_budget=budget, verify=verify)
    else:
        traffic = run_exchange(prepared, memory, comm, storage, directory, verify=verify)
    for key in planned.filled:
        for shard in planned.state.tensors[key].shards:
            _fill(shard, planned.common.global_step if planned.common is not None else 0)
    return traffic


def _read_alone(planned: PlannedLoad, handing: Handing, storage: Storage) -> Traffic:
    """Fill what other ranks should have read for this one."""
    plan, entries = handing.part_of(planned.plan, planned.entries, together=True)
    memory = converting(planned.state, planned.plan.cast, planned.scales)
    directory, budget, verify = planned.catalog.directory, planned.memory_budget, planned.verify
    return Traffic(*read_plan(plan, entries, memory, storage, directory, memory_budget=budget, verify=verify))


def _read_scales(planned: PlannedLoad, comm: Communicator, storage: Storage) -> Traffic:
    """Collective, where the load is about quantised tensors: read what every rank needs of their scales."""
    scales, directory, budget, verify = planned.scales, planned.catalog.directory, planned.memory_budget, planned.verify
    if scales is None:
        return Traffic()
    prepared = None
    if planned.balanced:
        prepared, _ = agree_on_exchange(scales.wanted, scales.plan, scales.catalog, planned.headers, comm, budget, planned.catalog)

    def execute() -> Traffic:
        if prepared is None:
            return Traffic(*read_plan(scales.plan, scales.entries, scales.state, storage, directory, memory_budget=budget, verify=verify))
        return run_exchange(prepared, scales.state, comm, storage, directory, verify=verify)

    traffic, error = attempt(execute)
    settle(comm, error, what="the load failed; nothing was changed")
    assert traffic is not None  # settle raises when any rank has failed
    return traffic


def _fill(shard: Shard, value: float | None) -> None:
    memory = shard.memory.read()
    shard.memory.write(Region.whole(memory.shape), np.full(memory.shape, value, memory.dtype))
