"""In which order stored bytes are read and sent: the same on both ends, so that no message says what is in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from reshard.geometry import DType
from reshard.planning.exchange_plan import BlockPlan, ExchangePlan, Part, Taker
from reshard.state import TensorKey


class Staged(NamedTuple):
    """A block that a reader holds for a while.

    Attributes:
        share: the index of its share among the reader's staged ones.
        tensor: the index of its tensor in the share.
        block: what is read, and who gets what of it.
    """

    share: int
    tensor: int
    block: BlockPlan


class Outgoing(NamedTuple):
    """A part to send, and the position of its block among those staged in its epoch."""

    position: int
    part: Part


class Incoming(NamedTuple):
    """A part to receive, and where it goes."""

    key: TensorKey
    dtype: DType
    part: Part


@dataclass
class Schedule:
    """What one rank reads and sends, epoch by epoch, and what it receives.

    An epoch is as much as a reader stages at a time. Parts of an epoch go to a target in the order in which they are listed here.

    Attributes:
        epochs: what this rank stages in each.
        outgoing: what it sends, by epoch and target.
        incoming: what it receives, by the source's epoch and source.
    """

    epochs: list[list[Staged]] = field(default_factory=list)
    outgoing: dict[tuple[int, int], list[Outgoing]] = field(default_factory=dict)
    incoming: dict[tuple[int, int], list[Incoming]] = field(default_factory=dict)

    @property
    def source_epochs(self) -> int:
        """The number of epochs of other ranks in which this rank may receive anything."""
        return max((epoch + 1 for epoch, _ in self.incoming), default=0)


def schedule_exchange(plan: ExchangePlan, rank: int, *, stage_bytes: int, block_bytes: int, gap_bytes: int) -> Schedule:
    """The schedule of one rank. Shares that go straight into memory are not in it.

    Args:
        plan: of the whole job.
        rank: whose schedule it is.
        stage_bytes: what a reader stages in an epoch (or one block).
        block_bytes: the longest run that is read.
        gap_bytes: the widest gap that is read over.
    """
    schedule = Schedule()
    # How far a reader is when it comes to what this rank gets depends on all that it stages; other readers don't matter.
    takes = _Takes(rank)
    readers = {rank} | {share.reader for share in plan.shares if any(takes(want.takers) for want in share.wants)}
    # By reader: the epoch that is being filled, and what is in it already.
    filled: dict[int, tuple[int, int]] = {}
    index = 0
    for share in plan.shares:
        if share.reader not in readers or share.is_straight:
            continue
        reads = share.reader == rank
        blocks = list(share.blocks(block_bytes, gap_bytes, only=None if reads else rank))
        epoch, used = filled.get(share.reader, (0, 0))
        for number, tensor in enumerate(share.tensors):
            for block in blocks:
                if used and used + block.nbytes > stage_bytes:
                    epoch, used = epoch + 1, 0
                used += block.nbytes
                if reads:
                    _stage(schedule, epoch, rank, Staged(index, number, block))
                elif block.parts:
                    parts = schedule.incoming.setdefault((epoch, share.reader), [])
                    parts += [Incoming(tensor.key, share.arrangement.dtype, part) for part in block.parts]
        filled[share.reader] = epoch, used
        index += reads
    return schedule


class _Takes:
    """Whether a rank is among takers, looked up once for all wants that have the same."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._known: dict[int, bool] = {}

    def __call__(self, takers: tuple[Taker, ...]) -> bool:
        found = self._known.get(id(takers))
        if found is None:
            found = self._known[id(takers)] = any(taker.rank == self._rank for taker in takers)
        return found


def _stage(schedule: Schedule, epoch: int, rank: int, staged: Staged) -> None:
    while len(schedule.epochs) <= epoch:
        schedule.epochs.append([])
    schedule.epochs[epoch].append(staged)
    for part in staged.block.parts:
        if part.rank != rank:
            schedule.outgoing.setdefault((epoch, part.rank), []).append(Outgoing(len(schedule.epochs[epoch]) - 1, part))
