"""Whether replicas are equal: each rank hashes what others hold too, and the hashes are compared before a save commits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from reshard.comm import Communicator
from reshard.errors import SaveError
from reshard.format.digest import DIGEST_BYTES, Hasher, digest_of
from reshard.format.names import tensor_name
from reshard.planning.mapping.memory import ComposedMemory
from reshard.planning.replicas import SharedRegions
from reshard.saving.outcome import Failure, name_ranks
from reshard.state import Memory, State

# Strided memory is gathered in pieces of so many bytes.
_PIECE_BYTES = 2 << 20

# An error names so many regions that differ.
_SHOWN = 8


class Single(msgspec.Struct, array_like=True):
    """What a rank tells of single regions that it holds with others.

    Attributes:
        digests: of each region, one after the other.
        names: of each region the tensor's name, the offset and the shape; only the first of the ranks says it.
    """

    digests: bytes
    names: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


class Replicas:
    """The digests of what this rank holds and others hold too, at one moment.

    Args:
        rank: this rank.
        shared: what it is.
        state: gives the values.
    """

    def __init__(self, rank: int, shared: Sequence[SharedRegions], state: State) -> None:
        self._rank = rank
        self._shared = {same.number: same for same in shared}
        self._digests = {
            same.number: b"".join(_digest_of(state.tensors[key].shards[shard].memory) for key, _, shard in same.regions) for same in shared
        }

    @property
    def folded(self) -> dict[int, bytes]:
        """One digest for all that the same ranks hold, by the number of these ranks."""
        return {number: digest_of(digests) for number, digests in self._digests.items()}

    def single(self, numbers: Iterable[int]) -> dict[int, Single]:
        """The digests of single regions, by the number of the ranks that hold them."""
        told = {}
        for number in numbers:
            same = self._shared.get(number)
            if same is not None:
                is_first = same.ranks[0] == self._rank
                names = [(tensor_name(key), region.offset, region.shape) for key, region, _ in same.regions] if is_first else []
                told[number] = Single(self._digests[number], names)
        return told


def compare(comm: Communicator, mine: Replicas | None, folded: Sequence[Mapping[int, bytes]]) -> Failure | None:
    """What replicas say against a commit: the same on every rank. Collective where some differ, else it communicates nothing.

    Args:
        comm: the ranks.
        mine: this rank's; None when it has none.
        folded: each rank's digests, as `Replicas.folded` gives them.
    """
    first: dict[int, bytes] = {}
    differing: set[int] = set()
    for own in folded:
        differing.update(number for number, digest in own.items() if first.setdefault(number, digest) != digest)
    if not differing:
        return None
    told = comm.all_gather(msgspec.msgpack.encode({} if mine is None else mine.single(sorted(differing))))
    found = _differences([msgspec.msgpack.decode(data, type=dict[int, Single]) for data in told])
    if not found:
        return None  # the rank that could name them failed, which says enough
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return Failure.of(
        SaveError(
            "ranks hold different values of the same region of a tensor; nothing was committed",
            tensor=found[0][0],
            found="\n".join([text for _, text in found[:_SHOWN]] + more),
            expected="equal bytes on all ranks that hold a region",
            fix="replicas have drifted apart: look for what changes parameters, buffers or the optimizer on some ranks only",
        )
    )


def _differences(told: Sequence[Mapping[int, Single]]) -> list[tuple[str, str]]:
    """The regions that differ: the tensor's name, and where, in words."""
    holders: dict[int, dict[int, Single]] = {}
    for rank, own in enumerate(told):
        for number, single in own.items():
            holders.setdefault(number, {})[rank] = single
    found = []
    for number in sorted(holders):
        ranks = holders[number]
        for index, (name, offset, shape) in enumerate(ranks[min(ranks)].names):
            alike: dict[bytes, list[int]] = {}
            for rank, single in ranks.items():
                alike.setdefault(single.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES], []).append(rank)
            if len(alike) > 1:
                # Most ranks first: what few hold is more likely what went wrong.
                values = sorted(alike.values(), key=len, reverse=True)
                words = [name_ranks(same) for same in values[:_SHOWN]] + (["…"] if len(values) > _SHOWN else [])
                found.append((name, f"{name}, offset {list(offset)}, shape {list(shape)}: one value on {', another on '.join(words)}"))
    return found


def _digest_of(memory: Memory) -> bytes:
    """Of a shard's values; what has yet to be gathered is, part by part."""
    if not isinstance(memory, ComposedMemory):
        return _digest(memory.read())
    hasher = Hasher()
    for block in memory.blocks():
        hasher.update(block.reshape(-1).view(np.uint8))
    return hasher.digest()


def _digest(array: np.ndarray) -> bytes:
    """Of the values in row-major order, whatever the strides."""
    if array.flags.c_contiguous:
        return digest_of(array.reshape(-1).view(np.uint8))
    hasher = Hasher()
    rows = max(1, _PIECE_BYTES * len(array) // array.nbytes)
    for begin in range(0, len(array), rows):
        hasher.update(np.ascontiguousarray(array[begin : begin + rows]).reshape(-1).view(np.uint8))
    return hasher.digest()
