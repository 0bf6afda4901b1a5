"""What ranks must tell each other once: how the state lies on each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from reshard.errors import CaptureError, CommunicationError
from reshard.geometry import DType, Layout, Mesh, Region
from reshard.geometry.dtypes import by_name
from reshard.state import Kind, State, TensorKey


@dataclass(frozen=True, slots=True)
class TensorDescription:
    """A sharded tensor without its memory: what one rank holds of it."""

    key: TensorKey
    dtype: DType
    global_shape: tuple[int, ...]
    layout: Layout | None
    regions: tuple[Region, ...]

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
    return RankDescription(
        rank,
        tuple(
            TensorDescription(t.key, t.dtype, tuple(t.global_shape), t.layout, tuple(s.region for s in t.shards))
            for t in state.tensors.values()
        ),
    )


def encode(description: RankDescription) -> bytes:
    """Bytes for the other ranks; each mesh and each layout is written once."""
    meshes: dict[Mesh, int] = {}
    layouts: dict[Layout, int] = {}
    # Hashing a layout goes over every rank of its mesh; most tensors share the few layout objects of their adapter.
    known: dict[int, int] = {}
    tensors = []
    for t in description.tensors:
        index = -1
        if t.layout is not None:
            found = known.get(id(t.layout))
            if found is None:
                meshes.setdefault(t.layout.mesh, len(meshes))
                found = known[id(t.layout)] = layouts.setdefault(t.layout, len(layouts))
            index = found
        regions = [(r.offset, r.shape) for r in t.regions]
        tensors.append((t.key.kind.value, t.key.slot, t.key.parameter, t.dtype.name, t.global_shape, index, regions))
    return msgspec.msgpack.encode(
        {
            "rank": description.rank,
            "meshes": [(m.shape, m.axes, m.ranks) for m in meshes],
            "layouts": [(meshes[layout.mesh], layout.split) for layout in layouts],
            "tensors": tensors,
        }
    )


class _Wire(msgspec.Struct):
    rank: int
    meshes: list[tuple[tuple[int, ...], tuple[str, ...], tuple[int, ...]]]
    layouts: list[tuple[int, tuple[tuple[int, ...], ...]]]
    tensors: list[tuple[str, str | None, str, str, tuple[int, ...], int, list[tuple[tuple[int, ...], tuple[int, ...]]]]]


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
    return RankDescription(
        wire.rank,
        tuple(
            TensorDescription(
                TensorKey(Kind(kind), slot, parameter),
                by_name(dtype),
                shape,
                None if index < 0 else layouts[index],
                tuple(Region(offset, extent) for offset, extent in regions),
            )
            for kind, slot, parameter, dtype, shape, index, regions in wire.tensors
        ),
    )


def digest(encoded: bytes) -> bytes:
    """16 bytes that differ when descriptions differ."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def place_of(state: State, rank: int) -> str:
    """A name for a rank's place in a strategy.

    Two runs give a rank the same one only if it holds the same regions of the same model tensors, on the same meshes. Per-rank values
    come back to the same place only.
    """
    model = {key: tensor for key, tensor in state.tensors.items() if key.kind is Kind.MODEL}
    return digest(encode(describe(State(tensors=model), rank))).hex()


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
