"""What ranks must tell each other once: how the state lies on each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from reshard.errors import CaptureError, CommunicationError
from reshard.geometry import DType, Layout, Mesh, Region
from reshard.geometry.dtypes import by_name
from reshard.state import Kind, State, TensorKey


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


@dataclass(frozen=True)
class RankDescription:
    """What one rank holds, in the order of its state."""

    rank: int
    tensors: tuple[TensorDescription, ...]

    @property
    def nbytes(self) -> int:
        """The bytes that the rank holds."""
        return sum(tensor.nbytes for tensor in self.tensors)


def describe(state: State, rank: int) -> RankDescription:
    """The description of one rank's state."""
    # By identity, which costs less than a hash over regions and mesh; adapters share the objects of tensors that lie alike, and the state
    # keeps them alive.
    known: dict[tuple[object, ...], Holding] = {}
    tensors = []
    for tensor in state.tensors.values():
        shards = tensor.shards
        alike = (tensor.dtype.name, tensor.global_shape, id(tensor.layout), *[id(shard.region) for shard in shards])
        holding = known.get(alike)
        if holding is None:
            regions = tuple(shard.region for shard in shards)
            holding = known[alike] = Holding(tensor.dtype, tuple(tensor.global_shape), tensor.layout, regions)
        tensors.append(TensorDescription(tensor.key, holding))
    return RankDescription(rank, tuple(tensors))


def encode(description: RankDescription) -> bytes:
    """Bytes for the other ranks; each mesh, layout and holding is written once."""
    meshes: dict[Mesh, int] = {}
    layouts: dict[Layout, int] = {}
    holdings: dict[int, int] = {}
    written = []
    tensors = []
    for (kind, slot, parameter), holding in description.tensors:
        index = holdings.get(id(holding))
        if index is None:
            index = holdings[id(holding)] = len(holdings)
            layout = -1
            if holding.layout is not None:
                meshes.setdefault(holding.layout.mesh, len(meshes))
                layout = layouts.setdefault(holding.layout, len(layouts))
            written.append((holding.dtype.name, holding.global_shape, layout, [(r.offset, r.shape) for r in holding.regions]))
        tensors.append((kind.value, slot, parameter, index))
    return msgspec.msgpack.encode(
        {
            "rank": description.rank,
            "meshes": [(m.shape, m.axes, m.ranks) for m in meshes],
            "layouts": [(meshes[layout.mesh], layout.split) for layout in layouts],
            "holdings": written,
            "tensors": tensors,
        }
    )


_Box = tuple[tuple[int, ...], tuple[int, ...]]


class _Wire(msgspec.Struct):
    rank: int
    meshes: list[tuple[tuple[int, ...], tuple[str, ...], tuple[int, ...]]]
    layouts: list[tuple[int, tuple[tuple[int, ...], ...]]]
    holdings: list[tuple[str, tuple[int, ...], int, list[_Box]]]
    tensors: list[tuple[str, str | None, str, int]]


def decode(data: bytes) -> RankDescription:
    """The inverse of `encode`.

    Raises:
        CommunicationError: bytes that it didn't write.
    """
    try:
        wire = msgspec.msgpack.decode(data, type=_Wire)
    except msgspec.MsgspecError as error:
        raise CommunicationError(
            "a rank's description can't be understood", found=str(error), fix="run the same version of reshard on every rank"
        ) from error
    meshes = [Mesh(*mesh) for mesh in wire.meshes]
    layouts = [Layout(meshes[mesh], split) for mesh, split in wire.layouts]
    holdings = [
        Holding(by_name(dtype), shape, None if layout < 0 else layouts[layout], tuple(Region(*box) for box in boxes))
        for dtype, shape, layout, boxes in wire.holdings
    ]
    kinds = {kind.value: kind for kind in Kind}
    return RankDescription(
        wire.rank,
        tuple(TensorDescription(TensorKey(kinds[kind], slot, parameter), holdings[index]) for kind, slot, parameter, index in wire.tensors),
    )


def digest(encoded: bytes) -> bytes:
    """16 bytes that differ when descriptions differ."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def place_of(description: RankDescription) -> str:
    """A name for a rank's place in a strategy.

    Two runs give a rank the same one only if it holds the same regions of the same model tensors, on the same meshes. Per-rank values
    come back to the same place only.
    """
    # Stored in checkpoints: text of its own, that doesn't change when ranks come to talk in another way.
    known: dict[int, bytes] = {}
    place = hashlib.blake2b(f"rank {description.rank}\n".encode(), digest_size=16)
    for key, holding in description.tensors:
        if key.kind is not Kind.MODEL:
            continue
        text = known.get(id(holding))
        if text is None:
            layout = holding.layout
            mesh = None if layout is None else (layout.mesh.shape, layout.mesh.axes, layout.mesh.ranks, layout.split)
            regions = [(region.offset, region.shape) for region in holding.regions]
            text = known[id(holding)] = repr((holding.dtype.name, tuple(holding.global_shape), mesh, regions)).encode()
        place.update(f"{key.parameter!r} ".encode("utf-8", "surrogatepass"))
        place.update(text + b"\n")
    return place.hexdigest()


def check_agreement(descriptions: Sequence[RankDescription]) -> None:
    """Hold the ranks' descriptions against each other.

    Raises:
        CaptureError: two ranks give one tensor different shapes or dtypes.
    """
    seen: dict[TensorKey, tuple[TensorDescription, int]] = {}
    for description in descriptions:
        for tensor in description.tensors:
            first, rank = seen.setdefault(tensor.key, (tensor, description.rank))
            for field, mine, theirs in (
                ("shape", tensor.global_shape, first.global_shape),
                ("dtype", tensor.dtype.name, first.dtype.name),
            ):
                if mine != theirs:
                    raise CaptureError(
                        f"two ranks give one tensor different {field}s",
                        tensor=f"{tensor.key.slot}.{tensor.key.parameter}" if tensor.key.slot else tensor.key.parameter,
                        rank=description.rank,
                        found=mine,
                        expected=f"{theirs}, as on rank {rank}",
                        fix="give different tensors different names, or the same tensor the same shape and dtype on every rank",
                    )
