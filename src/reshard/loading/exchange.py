"""Ranks read for each other: one rank's part of that, planned and checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from reshard.catalog import Catalog
from reshard.comm import Communicator
from reshard.comm.together import attempt, settle
from reshard.format.safetensors import TensorEntry
from reshard.loading.findings import unlisted_of
from reshard.loading.reader import locate
from reshard.planning.agreement import RankDescription
from reshard.planning.exchange_plan import Share, plan_exchange
from reshard.planning.exchange_schedule import Schedule, schedule_exchange
from reshard.planning.read_plan import ReadPlan
from reshard.planning.telling import decode_all, encode
from reshard.sources.stored import Headers

LANES = 2
"""Pairs of threads that send and receive, each with messages of its own in flight."""

# A message is at most this long: above some MiB nothing is gained, and each costs four times its length in buffers of both ends.
_MESSAGE_BYTES = 4 << 20

# What is read before it is sent, at most; the next stage is read meanwhile. More would only delay the first message.
_STAGE_BYTES = 32 << 20

# Gaps inside a box that nobody in the job wants are read over up to a page: less than that no file system reads anyway.
_GAP_BYTES = 4096

# The part of the budget with which a rank reads what it alone needs; the rest is for what others need, too.
_STRAIGHT_PART = 8


@dataclass(frozen=True)
class PreparedExchange:
    """One rank's part of an exchange, checked against the headers of the files that it reads.

    Attributes:
        straight: what it reads for itself alone.
        entries: where that lies.
        shares: what it stages.
        staged: of each of these shares, each tensor's entry in the file.
        schedule: in which order it stages, sends and receives.
        message_bytes: the longest message.
        straight_bytes: the memory with which it reads for itself alone.
    """

    straight: ReadPlan
    entries: list[list[TensorEntry]]
    shares: tuple[Share, ...]
    staged: tuple[tuple[TensorEntry, ...], ...]
    schedule: Schedule
    message_bytes: int
    straight_bytes: int

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the rank reads, in order."""
        return tuple(dict.fromkeys((*self.straight.files, *(share.site.file for share in self.shares))))


def agree_on_exchange(
    wanted: RankDescription,
    plan: ReadPlan,
    chosen: Catalog,
    headers: Headers,
    comm: Communicator,
    memory_budget: int,
    catalog: Catalog,
) -> tuple[PreparedExchange, set[str]]:
    """Collective: every rank's part of one exchange.

    Args:
        wanted: what this rank holds.
        plan: what it would read for itself.
        chosen: the part of the checkpoint that the load is about.
        headers: of its files.
        comm: the ranks.
        memory_budget: as in `prepare_exchange`.
        catalog: what the checkpoint holds.

    Returns:
        This rank's part, and the tensors of the files that the metadata doesn't list.

    Raises:
        ReshardError: as `prepare_exchange`, of whatever rank, the same on every rank.
    """
    restored = set(plan.restored)
    mine = replace(wanted, tensors=tuple(tensor for tensor in wanted.tensors if tensor.key in restored))
    texts = comm.all_gather(encode(mine))

    def prepare() -> tuple[PreparedExchange, list[str]]:
        prepared = prepare_exchange(decode_all(texts), chosen, headers, comm.rank, memory_budget)
        return prepared, unlisted_of(prepared.files, headers, catalog)

    made, error = attempt(prepare)
    names = settle(comm, error, b"" if made is None else msgspec.msgpack.encode(made[1]), what="the load failed; nothing was changed")
    assert made is not None  # settle raises when any rank has no part
    return made[0], {name for text in names for name in msgspec.msgpack.decode(text, type=list[str])}


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
        DataFileError: a file is missing, damaged, or doesn't hold what metadata promises.
    """
    plan = plan_exchange(descriptions, catalog)
    # Each lane has a message on either end, and a communicator may hold another copy of each; the rest is for two stages.
    straight_bytes = memory_budget // _STRAIGHT_PART
    message = min(_MESSAGE_BYTES, memory_budget // (LANES * 16))
    stage = min(_STAGE_BYTES, (memory_budget - straight_bytes - 4 * LANES * message) // 2)
    schedule = schedule_exchange(plan, rank, stage_bytes=stage, block_bytes=message, gap_bytes=_GAP_BYTES)
    mine = [share for share in plan.shares if share.reader == rank]
    straight = ReadPlan(rank, tuple(share.batch() for share in mine if share.is_straight), (), (), ())
    staged = tuple(share for share in mine if not share.is_straight)
    entries = tuple(entries_of(share, headers) for share in staged)
    return PreparedExchange(straight, locate(straight, headers), staged, entries, schedule, message, straight_bytes)


def entries_of(share: Share, headers: Headers) -> tuple[TensorEntry, ...]:
    """Of each tensor of a share its entry in the file's header, held against what metadata promises.

    Raises:
        DataFileError: the file is missing, damaged, or doesn't hold what metadata promises.
    """
    held = headers.get(share.site.file).entries
    dtype, shape = share.arrangement.dtype, share.piece.stored_shape
    entries = []
    for tensor in share.tensors:
        name = tensor.name + share.site.suffix
        entry = held.get(name)
        if entry is None or entry.shape != shape or entry.dtype != dtype:
            raise headers.broken_promise(share.site.file, name, dtype, shape)
        entries.append(entry)
    return tuple(entries)
