"""Ranks read for each other: one rank's part of that, planned and checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reshard.catalog import Catalog
from reshard.errors import UsageError
from reshard.format.safetensors import TensorEntry
from reshard.loading.reader import locate
from reshard.planning.agreement import RankDescription
from reshard.planning.exchange_plan import Share, plan_exchange
from reshard.planning.exchange_schedule import Schedule, schedule_exchange
from reshard.planning.read_plan import ReadPlan
from reshard.sources.native import Headers

MEMORY_BUDGET = 256 << 20
"""Bytes that a balanced load takes beyond the state, unless it is told otherwise."""

LANES = 2
"""Pairs of threads that send and receive, each with messages of its own in flight."""

# A message is at most this long: above some MiB nothing is gained, and each costs four times its length in buffers of both ends.
_MESSAGE_BYTES = 4 << 20

# What is read before it is sent, at most; the next stage is read meanwhile. More would only delay the first message.
_STAGE_BYTES = 32 << 20

# Gaps inside a box that nobody in the job wants are read over up to a page: less than that no file system reads anyway.
_GAP_BYTES = 4096

# Below this a message holds less than what it costs.
_LEAST_BUDGET = 1 << 20


@dataclass(frozen=True)
class PreparedExchange:
    """One rank's part of an exchange, checked against the headers of the files that it reads.

    Attributes:
        straight: what it reads for itself alone.
        entries: where that lies.
        shares: what it stages.
        begins: of each of these shares, where each tensor's data begins in the file.
        schedule: in which order it stages, sends and receives.
        message_bytes: the longest message.
    """

    straight: ReadPlan
    entries: list[TensorEntry]
    shares: tuple[Share, ...]
    begins: tuple[tuple[int, ...], ...]
    schedule: Schedule
    message_bytes: int

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the rank reads, in order."""
        return tuple(dict.fromkeys((*self.straight.files, *(share.site.file for share in self.shares))))


def check_budget(memory_budget: int) -> None:
    """See that a balanced load can work with so many bytes.

    Raises:
        UsageError: it can't.
    """
    if memory_budget < _LEAST_BUDGET:
        raise UsageError(
            "too little memory to exchange anything", field="memory_budget", found=memory_budget, expected=f"at least {_LEAST_BUDGET} bytes"
        )


def prepare_exchange(
    descriptions: Sequence[RankDescription], catalog: Catalog, headers: Headers, rank: int, memory_budget: int
) -> PreparedExchange:
    """Plan a balanced load, and look whether the files hold what this rank is to read of them.

    Args:
        descriptions: of all ranks: the tensors that they load.
        catalog: what the checkpoint holds, the same on every rank.
        headers: of its files.
        rank: this rank.
        memory_budget: bytes for staging and messages together.

    Raises:
        UsageError: a budget too small to work with.
        DataFileError: a file is missing, damaged, or doesn't hold what metadata promises.
    """
    check_budget(memory_budget)
    plan = plan_exchange(descriptions, catalog)
    # Each lane has a message on either end, and a communicator may hold another copy of each; the rest is for two stages.
    message = min(_MESSAGE_BYTES, memory_budget // (LANES * 16))
    stage = min(_STAGE_BYTES, (memory_budget - 4 * LANES * message) // 2)
    schedule = schedule_exchange(plan, rank, stage_bytes=stage, block_bytes=message, gap_bytes=_GAP_BYTES)
    mine = [share for share in plan.shares if share.reader == rank]
    transfers = tuple(transfer for share in mine if share.is_straight for transfer in share.transfers())
    straight = ReadPlan(rank, transfers, (), (), ())
    staged = tuple(share for share in mine if not share.is_straight)
    begins = tuple(_begins(share, headers) for share in staged)
    return PreparedExchange(straight, locate(straight, headers), staged, begins, schedule, message)


def _begins(share: Share, headers: Headers) -> tuple[int, ...]:
    held = headers.get(share.site.file).entries
    dtype, shape = share.arrangement.dtype, share.piece.region.shape
    begins = []
    for tensor in share.tensors:
        name = tensor.name + share.site.suffix
        entry = held.get(name)
        if entry is None or entry.shape != shape or entry.dtype != dtype:
            raise headers.broken_promise(share.site.file, name, dtype, shape)
        begins.append(entry.begin)
    return tuple(begins)
