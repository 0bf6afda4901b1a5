"""What ranks must tell each other once: how the state lies on each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, overload

import numpy as np

from reshard.geometry import DType, Layout, Region
from reshard.rows import rows
from reshard.state import Kind, ShardedTensor, State, TensorKey


@dataclass(frozen=True, slots=True)
class Holding:
    """What a rank holds of a tensor, without the tensor's name. Tensors that lie alike share one, so that plans are made once for all.

    Caches go by its identity: its hash goes over the ranks of its mesh.

    Attributes:
        dtype: the element type.
        global_shape: the shape of the whole tensor.
        layout: how it lies on its mesh, or None.
        regions: what the rank holds.
    """

    dtype: DType
    global_shape: tuple[int, ...]
    layout: Layout | None
    regions: tuple[Region, ...]


class TensorDescription(NamedTuple):
    """A sharded tensor without its memory: what one rank holds of it."""

    key: TensorKey
    holding: Holding

    @property
    def dtype(self) -> DType:
        """The element type."""
        return self.holding.dtype

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.holding.global_shape

    @property
    def layout(self) -> Layout | None:
        """How it lies on its mesh, or None."""
        return self.holding.layout

    @property
    def regions(self) -> tuple[Region, ...]:
        """What the rank holds."""
        return self.holding.regions

    @property
    def nbytes(self) -> int:
        """The bytes that the rank holds."""
        return self.dtype.itemsize * sum(region.size for region in self.regions)


class TensorTable(Sequence[TensorDescription]):
    """Descriptions of tensors that become objects when they are asked for; equal to any sequence of the same ones.

    The ranks of a job have millions of them, but few lists of keys and few holdings.

    Attributes:
        keys: of each tensor.
        holdings: the different ones.
        numbers: integers: of each tensor the index of its holding.
    """

    def __init__(self, keys: tuple[TensorKey, ...], holdings: tuple[Holding, ...], numbers: np.ndarray) -> None:
        self.keys = keys
        self.holdings = holdings
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> TensorDescription: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TensorDescription, ...]: ...
    def __getitem__(self, index: int | slice) -> TensorDescription | tuple[TensorDescription, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        return TensorDescription(self.keys[index], self.holdings[self.numbers[index]])

    def __iter__(self) -> Iterator[TensorDescription]:
        return map(TensorDescription, self.keys, map(self.holdings.__getitem__, self.numbers.tolist()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))


@dataclass(frozen=True)
class RankDescription:
    """What one rank holds, in the order of its state."""

    rank: int
    tensors: Sequence[TensorDescription]

    @property
    def nbytes(self) -> int:
        """The bytes that the rank holds."""
        known: dict[int, int] = {}  # of tensors that lie alike, by the identity of what says so
        total = 0
        for tensor in self.tensors:
            nbytes = known.get(id(tensor.holding))
            if nbytes is None:
                nbytes = known[id(tensor.holding)] = tensor.nbytes
            total += nbytes
        return total


_KEY_OF: Callable[[ShardedTensor], TensorKey] = attrgetter("key")


def describe(state: State, rank: int) -> RankDescription:
    """The description of one rank's state."""
    # By identity, which costs less than a hash over regions and mesh; adapters share the objects of tensors that lie alike, and the state
    # keeps them alive.
    known: dict[tuple[object, ...], Holding] = {}
    holdings: list[Holding] = []
    holding = region = None
    for _, dtype, shape, layout, shards in state.tensors.values():
        only = shards[0].region if len(shards) == 1 else None
        # Most lie as the one before.
        is_same = holding is not None and only is region is not None and layout is holding.layout and dtype is holding.dtype
        if holding is None or not is_same or shape != holding.global_shape:
            region = only
            alike = (id(dtype), shape, id(layout), *[id(shard.region) for shard in shards])
            holding = known.get(alike)
            if holding is None:
                holding = known[alike] = Holding(dtype, tuple(shape), layout, tuple(shard.region for shard in shards))
        holdings.append(holding)
    keys = map(_KEY_OF, state.tensors.values())
    return RankDescription(rank, tuple(rows(TensorDescription, keys, holdings)))


def digest(encoded: bytes) -> bytes:
    """16 bytes that differ when descriptions differ."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def place_of(description: RankDescription) -> str:
    """A name for a rank's place in a strategy.

    Two runs give a rank the same one only if it holds the same regions of the same model tensors, on the same meshes. Per-rank values
    come back to the same place only.
    """
    # Stored in checkpoints: text of its own, that doesn't change when ranks come to talk in another way.
    known: dict[int, str] = {}
    lines = [f"rank {description.rank}\n"]
    kind = Kind.MODEL  # to look it up for each tensor takes longer than to compare it
    last, text = None, ""
    for key, holding in description.tensors:
        if key.kind is not kind:
            continue
        if holding is not last:
            last, text = holding, known.get(id(holding), "")
            if not text:
                text = known[id(holding)] = _text_of(holding)
        lines.append(f"{key.parameter!r} {text}\n")
    return hashlib.blake2b("".join(lines).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _text_of(holding: Holding) -> str:
    layout = holding.layout
    mesh = None if layout is None else (layout.mesh.shape, layout.mesh.axes, layout.mesh.ranks, layout.split)
    regions = [(region.offset, region.shape) for region in holding.regions]
    return repr((holding.dtype.name, tuple(holding.global_shape), mesh, regions))
