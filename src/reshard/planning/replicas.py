"""Which regions several ranks hold: what must be equal on all of them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

from reshard.catalog import Arrangement, Catalog
from reshard.geometry import Region
from reshard.planning.agreement import RankDescription
from reshard.state import TensorKey


class SharedRegion(NamedTuple):
    """A region that other ranks hold too.

    Attributes:
        key: the tensor.
        region: which part of it.
        shard: which of this rank's shards of the tensor it is.
    """

    key: TensorKey
    region: Region
    shard: int


@dataclass(frozen=True, slots=True)
class SharedRegions:
    """All that the same ranks hold.

    Attributes:
        number: the same on every rank, different for other ranks.
        ranks: who holds it, ascending.
        regions: in an order that is the same on each of these ranks.
    """

    number: int
    ranks: tuple[int, ...]
    regions: list[SharedRegion]


def find_shared(description: RankDescription, catalog: Catalog) -> list[SharedRegions]:
    """What a rank holds that others hold too.

    Regions without elements have nothing to compare. Of a tensor that stages split in different ways the first one's regions are in
    the catalog, and only these are compared.

    Args:
        description: what the rank holds.
        catalog: of the whole job.
    """
    finder = _Finder(description.rank)
    held = {tensor.key: tensor.holding for tensor in description.tensors}
    shards: dict[int, dict[Region, int]] = {}  # by holding
    found: dict[int, SharedRegions] = {}
    for key, stored in catalog.tensors.items():
        pieces = finder.shared(stored.arrangement)
        if not pieces:
            continue
        holding = held[key]
        own = shards.get(id(holding))
        if own is None:
            own = shards[id(holding)] = {region: shard for shard, region in enumerate(holding.regions)}
        for number, ranks, region in pieces:
            found.setdefault(number, SharedRegions(number, ranks, [])).regions.append(SharedRegion(key, region, own[region]))
    return list(found.values())


class _Finder:
    """Looks at each arrangement once. Sets of ranks are numbered as they come, those without this rank too, so that all number alike."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._numbers: dict[tuple[int, ...], int] = {}
        self._known: dict[int, list[tuple[int, tuple[int, ...], Region]]] = {}

    def shared(self, arrangement: Arrangement) -> list[tuple[int, tuple[int, ...], Region]]:
        """The pieces that this rank and others hold: the number of their holders, the holders, the region."""
        found = self._known.get(id(arrangement))
        if found is None:
            found = self._known[id(arrangement)] = []
            for piece in arrangement.pieces:
                ranks = piece.holders
                if len(ranks) > 1 and not piece.region.is_empty:
                    number = self._numbers.setdefault(ranks, len(self._numbers))
                    place = bisect_left(ranks, self._rank)
                    if place < len(ranks) and ranks[place] == self._rank:
                        found.append((number, ranks, piece.region))
        return found
