"""The compact index of a checkpoint: what `metadata.json` says, in a form that is read at once.

`metadata.json` repeats for every tensor how it lies and where each part is stored. The index (a file of this project's own, among the
extras) says it once for all tensors that lie alike, and then only their names. It is also what one rank tells the others, so that a job
parses metadata once.

The file is 16 bytes, the digest of what follows, and a MessagePack map. It names the digest of the metadata that it was made from; a reader
that finds another one takes it for stale and goes back to the metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import xxhash

from reshard.catalog import Arrangement, Catalog, Piece, Site, StoredTensor
from reshard.errors import ReshardError
from reshard.format.names import is_plain_file_name, parse_tensor_name
from reshard.geometry import Layout, Mesh, Region
from reshard.geometry.cover import cover_fault
from reshard.geometry.dtypes import by_name
from reshard.state import Kind, TensorKey

INDEX_FILE = "metadata.index"

# A reader takes an index of another version for stale.
INDEX_VERSION = 1

_DIGEST_BYTES = 16
_KINDS = tuple(Kind)

_Box = tuple[tuple[int, ...], tuple[int, ...]]
_Site = tuple[int, int, str]
_Piece = tuple[_Box, int, list[_Site]]


class _Index(msgspec.Struct):
    version: int
    metadata: bytes
    format_version: int | None
    notes: list[str]
    meshes: list[tuple[tuple[int, ...], tuple[str, ...], tuple[int, ...]]]
    layouts: list[tuple[int, tuple[tuple[int, ...], ...]]]
    files: list[str]
    holders: list[tuple[int, ...]]
    arrangements: list[tuple[str, tuple[int, ...], int, list[_Piece]]]
    names: list[str]
    kinds: bytes
    arranged: bytes


def digest_of(data: bytes) -> bytes:
    """The digest by which an index knows its metadata (XXH3, 128 bits)."""
    return xxhash.xxh3_128_digest(data)


def encode_index(catalog: Catalog, metadata: bytes) -> bytes:
    """The index of a catalog.

    Args:
        catalog: what the metadata says.
        metadata: the digest of `metadata.json`; empty when there is none.
    """
    meshes: dict[Mesh, int] = {}
    layouts: dict[Layout, int] = {}
    files: dict[str, int] = {}
    holders: dict[tuple[int, ...], int] = {}
    written: list[tuple[str, tuple[int, ...], int, list[_Piece]]] = []
    known: dict[int, int] = {}
    known_layouts: dict[int, int] = {}

    def layout_of(layout: Layout | None) -> int:
        if layout is None:
            return -1
        index = known_layouts.get(id(layout))
        if index is None:
            meshes.setdefault(layout.mesh, len(meshes))
            index = known_layouts[id(layout)] = layouts.setdefault(layout, len(layouts))
        return index

    def write(arrangement: Arrangement) -> None:
        pieces = [
            (
                (piece.region.offset, piece.region.shape),
                holders.setdefault(piece.holders, len(holders)),
                [(files.setdefault(site.file, len(files)), site.rank, site.suffix) for site in piece.sites],
            )
            for piece in arrangement.pieces
        ]
        written.append((arrangement.dtype.name, arrangement.global_shape, layout_of(arrangement.layout), pieces))

    arranged = np.empty(len(catalog.tensors), "<u4")
    for position, tensor in enumerate(catalog.tensors.values()):
        index = known.get(id(tensor.arrangement))
        if index is None:
            index = known[id(tensor.arrangement)] = len(written)
            write(tensor.arrangement)
        arranged[position] = index
    body = msgspec.msgpack.encode(
        _Index(
            INDEX_VERSION,
            metadata,
            catalog.format_version,
            list(catalog.notes),
            [(mesh.shape, mesh.axes, mesh.ranks) for mesh in meshes],
            [(meshes[layout.mesh], layout.split) for layout in layouts],
            list(files),
            list(holders),
            written,
            [tensor.name for tensor in catalog.tensors.values()],
            bytes(_KINDS.index(key.kind) for key in catalog.tensors),
            arranged.tobytes(),
        )
    )
    return digest_of(body) + body


def decode_index(data: bytes, directory: str, metadata: bytes | None = None) -> Catalog | None:
    """The catalog that an index describes; None when it is damaged, of another version, or of other metadata.

    Args:
        data: the index.
        directory: of the checkpoint.
        metadata: the digest of the `metadata.json` that is there; None to take the index at its word.
    """
    body = data[_DIGEST_BYTES:]
    if digest_of(body) != data[:_DIGEST_BYTES]:
        return None
    try:
        index = msgspec.msgpack.decode(body, type=_Index)
        if index.version != INDEX_VERSION or (metadata is not None and index.metadata != metadata):
            return None
        return Catalog(directory, _tensors(index), tuple(index.notes), index.format_version)
    except (msgspec.MsgspecError, ReshardError, IndexError, ValueError):
        return None


def _tensors(index: _Index) -> Mapping[TensorKey, StoredTensor]:
    meshes = [Mesh(*mesh) for mesh in index.meshes]
    layouts = [Layout(meshes[mesh], split) for mesh, split in index.layouts]
    if not all(is_plain_file_name(file) for file in index.files):
        raise ValueError("a file name that leads out of the checkpoint's directory")
    arrangements = [_arrangement(item, index, layouts) for item in index.arrangements]
    numbers = np.frombuffer(index.arranged, "<u4").tolist()
    tensors = {}
    for name, kind, number in zip(index.names, index.kinds, numbers, strict=True):
        key = parse_tensor_name(name, _KINDS[kind])
        tensors[key] = StoredTensor(key, name, arrangements[number])
    return tensors


def _arrangement(item: tuple[str, tuple[int, ...], int, list[_Piece]], index: _Index, layouts: Sequence[Layout]) -> Arrangement:
    dtype, shape, layout, pieces = item
    made = tuple(
        Piece(Region(*box), tuple(Site(index.files[file], rank, suffix) for file, rank, suffix in sites), index.holders[group])
        for box, group, sites in pieces
    )
    if cover_fault([piece.region for piece in made], shape) is not None:
        raise ValueError("pieces that don't cover their tensor")
    return Arrangement(by_name(dtype), shape, None if layout < 0 else layouts[layout], made)
