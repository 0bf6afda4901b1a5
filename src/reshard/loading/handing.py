"""Ranks of one machine read rows for each other, where each needs columns of them: every page of a file is read once, not once by each.

What a rank has read it writes straight into the memory of those who need it. The ranks tell each other where that is before anything is
read. What one that can't reach all others doesn't hand over, these read for themselves in the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from reshard.catalog import Catalog
from reshard.comm.neighbours import Door, Neighbour, Notice, are_writable
from reshard.errors import CommunicationError, ReshardError
from reshard.format.safetensors import TensorEntry
from reshard.geometry import Region
from reshard.loading.exchange import entries_of
from reshard.planning.agreement import RankDescription
from reshard.planning.columns import columns_in, of_tensors, plan_together
from reshard.planning.exchange_plan import Share
from reshard.planning.read_plan import Batch, ReadPlan
from reshard.planning.telling import decode_all, encode
from reshard.sources.stored import Headers
from reshard.state import Memory, State, TensorKey

# With fewer bytes of columns a rank reads for itself: they take less time than to find the neighbours and to plan with them.
_LEAST_BYTES = 32 << 20


class _Told(msgspec.Struct, array_like=True):
    """What a rank tells its neighbours.

    Attributes:
        description: of the tensors of which it needs columns.
        addresses: int64: where each of their shards lies in its memory, in the same order; 0 for empty ones.
    """

    description: bytes
    addresses: bytes


@dataclass(frozen=True)
class Offer:
    """What a rank lets its neighbours fill.

    Attributes:
        told: the tensors, and where they lie, as the neighbours hear it.
        door: through which they come.
    """

    told: bytes
    door: Door


def offer_columns(plan: ReadPlan, state: State, wanted: RankDescription) -> Offer | None:
    """Let the other ranks of this machine fill the tensors of which this rank needs columns; None where it would be of no use, or can't be.

    Args:
        plan: what the rank reads.
        state: what it fills.
        wanted: the description of that.
    """
    columns = columns_in(plan)
    if sum(columns.values()) < _LEAST_BYTES:
        return None
    addresses = {key: _addresses(state, key) for key in columns}
    reachable = {key for key, places in addresses.items() if None not in places}
    if sum(columns[key] for key in reachable) < _LEAST_BYTES:
        return None
    description = of_tensors(wanted, reachable)
    listed = [place for tensor in description.tensors for place in addresses[tensor.key]]
    told = msgspec.msgpack.encode(_Told(encode(description), np.array(listed, "<i8").tobytes()))
    places = [
        (place, shard.memory.nbytes)
        for key in reachable
        for place, shard in zip(addresses[key], state.tensors[key].shards, strict=True)
        if place
    ]
    if not are_writable(places):
        return None
    door = Door.open(told)
    return None if door is None else Offer(told, door)


def _addresses(state: State, key: TensorKey) -> list[int | None]:
    """Where each shard of a tensor lies, None where others can't fill it."""
    tensor = state.tensors[key]
    return [_address(shard.memory, shard.region, tensor.dtype.itemsize) for shard in tensor.shards]


def _address(memory: Memory, region: Region, itemsize: int) -> int | None:
    if region.is_empty:
        return 0
    return memory.address if memory.nbytes == itemsize * region.size else None


@dataclass(frozen=True)
class Handing:
    """One rank's part of what the ranks of its machine read for each other.

    Attributes:
        rank: the rank.
        shares: what it reads.
        entries: of each of these shares, each tensor's entry in the file.
        neighbours: those for whom it reads, by rank.
        addresses: of each rank, itself included, and each tensor of these shares, where each shard lies.
        keys: of the tensors that the ranks read for each other, those of which this rank gets its part.
        given: of each neighbour, the bytes that it gets.
    """

    rank: int
    shares: tuple[Share, ...]
    entries: tuple[tuple[TensorEntry, ...], ...]
    neighbours: Mapping[int, Neighbour]
    addresses: Mapping[int, Mapping[TensorKey, Sequence[int]]]
    keys: frozenset[TensorKey]
    given: Mapping[int, int]

    def close(self) -> None:
        """Let go of the neighbours."""
        for neighbour in self.neighbours.values():
            neighbour.close()

    def part_of(
        self, plan: ReadPlan, entries: Sequence[Sequence[TensorEntry]], *, together: bool
    ) -> tuple[ReadPlan, list[list[TensorEntry]]]:
        """What of a plan (and of where that lies) the ranks read for each other, or what the rank reads for itself."""
        batches: list[Batch] = []
        left: list[list[TensorEntry]] = []
        for (movement, keys, names), held in zip(plan.batches, entries, strict=True):
            kept = [index for index, key in enumerate(keys) if (key in self.keys) == together]
            if kept:
                batches.append(Batch(movement, [keys[index] for index in kept], [names[index] for index in kept]))
                left.append([held[index] for index in kept])
        return replace(plan, batches=tuple(batches)), left


def machines(notices: Sequence[Notice | None]) -> list[dict[int, Notice]]:
    """The ranks that have made an offer, by machine: of those on which there are several."""
    hosts: defaultdict[str, dict[int, Notice]] = defaultdict(dict)
    for rank, notice in enumerate(notices):
        if notice is not None:
            hosts[notice.host][rank] = notice
    return [group for group in hosts.values() if len(group) > 1]


def prepare_handing(offer: Offer, group: Mapping[int, Notice], catalog: Catalog, headers: Headers, rank: int) -> Handing | None:
    """What a rank reads for the others of its machine, and they for it.

    No rank waits to hear whether all others can do their part: it begins, and what those who can't would have read for it, it reads itself
    when all have told each other how it went. So a rank's memory may be written before it has come so far itself.

    Args:
        offer: the rank's own.
        group: the doors of all ranks of the machine that have made one, its own included.
        catalog: what the checkpoint holds, the same on every rank.
        headers: of its files.
        rank: the rank.

    Returns:
        The rank's part, to be closed; None when it doesn't reach all others, or when there is nothing to be read together.

    Raises:
        DataFileError: a file is missing, damaged, or doesn't hold what metadata promises.
        ReshardError: what another rank tells can't be understood.
    """
    neighbours: dict[int, Neighbour] = {}
    with ExitStack() as opened:
        try:
            for other, notice in group.items():
                if other != rank:
                    neighbours[other] = opened.enter_context(closing(Neighbour(other, notice, rank)))
        except OSError:
            return None
        texts = [offer.told if other == rank else neighbours[other].told for other in group]
        told = [msgspec.msgpack.decode(text, type=_Told) for text in texts]
        try:
            descriptions = decode_all([one.description for one in told])
        except CommunicationError as error:
            # All can still be told of it, other than of a rank that is gone.
            raise ReshardError(error.what, found=error.found, fix=error.fix) from error
        plan = plan_together(descriptions, catalog)
        if not plan.shares:
            return None
        mine = tuple(share for share in plan.shares if share.reader == rank)
        concerned = {tensor.key for share in mine for tensor in share.tensors}
        addresses = {one.rank: _by_tensor(one, told.addresses, concerned) for one, told in zip(descriptions, told, strict=True)}
        offered = {tensor.key for tensor in next(one for one in descriptions if one.rank == rank).tensors}
        handing = Handing(
            rank,
            mine,
            tuple(entries_of(share, headers) for share in mine),
            neighbours,
            addresses,
            # What others need columns of it may itself need otherwise, and then it has not told of it.
            frozenset(tensor.key for share in plan.shares for tensor in share.tensors if tensor.key in offered),
            {other: sum(_taken(share, other) for share in mine) for other in neighbours},
        )
        opened.pop_all()
    return handing


def _by_tensor(description: RankDescription, addresses: bytes, concerned: Collection[TensorKey]) -> dict[TensorKey, list[int]]:
    places = np.frombuffer(addresses, "<i8").tolist()
    found: dict[TensorKey, list[int]] = {}
    first = 0
    for key, holding in description.tensors:
        end = first + len(holding.regions)
        if key in concerned:
            found[key] = places[first:end]
        first = end
    return found


def _taken(share: Share, rank: int) -> int:
    """The bytes that a rank gets of a share."""
    return sum(nbytes * sum(taker.rank == rank for taker in want.takers) for want, nbytes in share.taken())
