"""Which of its holders writes each region, where every region is written once: evenly by bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

# The fullest rank may have so many hundredths more than the mean; below that nothing is moved any more.
_ALLOWANCE = 102

# Sharing out again beside all others evens out what the first round couldn't see. It hardly ever takes more than two rounds; a round that
# takes less than this part off the sum of squares is the last.
_ROUNDS = 8
_SETTLED = 1000


@dataclass(frozen=True, slots=True)
class Lot:
    """The same region of tensors that lie alike.

    Attributes:
        count: the number of tensors.
        nbytes: the bytes of the region.
        ranks: those that hold it, ascending.
    """

    count: int
    nbytes: int
    ranks: tuple[int, ...]


# Of a lot: the ranks that write any, ascending, each with the number of tensors.
Shares = tuple[tuple[int, int], ...]


def share_lots(lots: Sequence[Lot], world_size: int) -> list[Shares]:
    """Who writes how many of each lot; the same for the same arguments, on every rank.

    What fewest can write is given away first, the largest of it before the smaller, each to the least loaded of its holders (of several the
    lowest rank). Then each lot is shared out again beside all others until the fullest rank is near the mean, or hardly anything changes.

    Args:
        lots: all there is to write.
        world_size: the number of ranks.
    """
    loads = [0] * world_size
    shares: list[Shares] = [()] * len(lots)
    free = []
    for index, lot in enumerate(lots):
        if len(lot.ranks) == 1:
            shares[index] = ((lot.ranks[0], lot.count),)
            loads[lot.ranks[0]] += lot.count * lot.nbytes
        else:
            free.append(index)
    free.sort(key=lambda index: (len(lots[index].ranks), -lots[index].nbytes))
    total = sum(lot.count * lot.nbytes for lot in lots)
    unevenness = None
    for _ in range(_ROUNDS):
        for index in free:
            shares[index] = _share(lots[index], shares[index], loads)
        # It never grows from round to round: each lot takes its least given all others.
        before, unevenness = unevenness, sum(load * load for load in loads)
        is_settled = before is not None and (before - unevenness) * _SETTLED <= before
        if is_settled or max(loads, default=0) * world_size * 100 <= total * _ALLOWANCE:
            break
    return shares


def _share(lot: Lot, before: Shares, loads: list[int]) -> Shares:
    """Share a lot out as if each went to the least loaded holder in turn; `loads` are brought up to date."""
    size = max(1, lot.nbytes)  # what has no bytes is spread, too
    for rank, count in before:
        loads[rank] -= count * lot.nbytes
    # All go to the lowest ranks, which are filled up to one level; the level is where the next one begins, or below.
    lowest = sorted(lot.ranks, key=loads.__getitem__)
    filled, number = lot.count * size, 0
    for number, rank in enumerate(lowest, 1):
        filled += loads[rank]
        if number == len(lowest) or filled <= loads[lowest[number]] * number:
            break
    level = filled // number
    counts = {rank: (level - loads[rank]) // size for rank in sorted(lowest[:number])}
    # Fewer are left than there are ranks: one each for the lowest.
    left = lot.count - sum(counts.values())
    for rank in sorted(counts, key=lambda rank: loads[rank] + counts[rank] * size)[:left]:
        counts[rank] += 1
    for rank, count in counts.items():
        loads[rank] += count * lot.nbytes
    return tuple((rank, count) for rank, count in counts.items() if count)


class Run(NamedTuple):
    """Neighbours among tensors that lie alike, whose regions the same ranks write.

    Attributes:
        first: the first tensor.
        end: the one after the last.
        writers: of each region the rank that writes it.
    """

    first: int
    end: int
    writers: tuple[int, ...]


def runs_of(shares: Sequence[Shares], count: int) -> Iterator[Run]:
    """Which tensors each rank's shares are: neighbours go to the same rank, so that few differ in who writes their regions.

    Args:
        shares: of each region of tensors that lie alike.
        count: the number of tensors.
    """
    ends = [list(accumulate(number for _, number in share)) for share in shares]
    firsts = sorted({0, *(end for own in ends for end in own[:-1])})
    columns = []
    for share, own in zip(shares, ends, strict=True):
        if len(share) == 1:
            columns.append([share[0][0]] * len(firsts))
        else:
            columns.append([share[bisect_right(own, first)][0] for first in firsts])
    for number, (first, end) in enumerate(pairwise([*firsts, count])):
        yield Run(first, end, tuple(column[number] for column in columns))
