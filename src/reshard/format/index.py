"""The compact index of a checkpoint: what `metadata.json` says, in a form that is read at once.

`metadata.json` repeats for every tensor how it lies and where each part is stored. The index (a file of this project's own, among the
extras) says it once for all tensors that lie alike, and then only their names. It is also what one rank tells the others, so that a job
parses metadata once.

The file is 16 bytes, the digest of what follows, and a MessagePack map, in which pieces are columns (`piece_table`). It names the digest of
the metadata that it was made from; a reader that finds another one takes it for stale and goes back to the metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated

import msgspec
import numpy as np

from reshard.catalog import Arrangement, Catalog, StoredTensor
from reshard.errors import ReshardError
from reshard.format.digest import DIGEST_BYTES, digest_of
from reshard.format.names import is_plain_file_name, parse_tensor_names
from reshard.format.piece_table import Columns, decode_pieces, encode_pieces, pack, unpack
from reshard.geometry import Layout, Mesh
from reshard.geometry.dtypes import by_name
from reshard.rows import rows
from reshard.state import Kind, TensorKey

INDEX_FILE = "metadata.index"

# A reader takes an index of another version for stale.
INDEX_VERSION = 2

_KINDS = tuple(Kind)

# What `metadata.json` may say, too: arithmetic on offsets stays in 64 bits.
_Extent = Annotated[int, msgspec.Meta(ge=0, lt=2**60)]


class _Index(msgspec.Struct):
    version: int
    metadata: bytes
    format_version: int | None
    notes: list[str]
    meshes: list[tuple[tuple[int, ...], tuple[str, ...], tuple[int, ...]]]
    layouts: list[tuple[int, tuple[tuple[int, ...], ...]]]
    arrangements: list[tuple[str, tuple[_Extent, ...], int]]
    pieces: Columns
    names: list[str]
    kinds: bytes
    arranged: bytes


def encode_index(catalog: Catalog, metadata: bytes) -> bytes:
    """The index of a catalog.

    Args:
        catalog: what the metadata says.
        metadata: the digest of `metadata.json`; empty when there is none.
    """
    meshes: dict[Mesh, int] = {}
    layouts: dict[Layout, int] = {}
    known_layouts: dict[int, int] = {-1: -1}

    def number_of(layout: Layout | None) -> int:
        key = -1 if layout is None else id(layout)
        index = known_layouts.get(key)
        if index is None:
            assert layout is not None  # -1 is known
            meshes.setdefault(layout.mesh, len(meshes))
            index = known_layouts[key] = layouts.setdefault(layout, len(layouts))
        return index

    arrangements: dict[int, Arrangement] = {id(tensor.arrangement): tensor.arrangement for tensor in catalog.tensors.values()}
    numbers = {identity: number for number, identity in enumerate(arrangements)}
    arranged = [(a.dtype.name, a.global_shape, number_of(a.layout)) for a in arrangements.values()]
    body = msgspec.msgpack.encode(
        _Index(
            INDEX_VERSION,
            metadata,
            catalog.format_version,
            list(catalog.notes),
            [(mesh.shape, mesh.axes, mesh.ranks) for mesh in meshes],
            [(meshes[layout.mesh], layout.split) for layout in layouts],
            arranged,
            encode_pieces(list(arrangements.values())),
            [tensor.name for tensor in catalog.tensors.values()],
            bytes(_KINDS.index(key.kind) for key in catalog.tensors),
            pack([numbers[id(tensor.arrangement)] for tensor in catalog.tensors.values()]),
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
    body = data[DIGEST_BYTES:]
    if digest_of(body) != data[:DIGEST_BYTES]:
        return None
    try:
        index = msgspec.msgpack.decode(body, type=_Index)
        if index.version != INDEX_VERSION or (metadata is not None and index.metadata != metadata):
            return None
        return Catalog(directory, _tensors(index, is_own=metadata is not None), tuple(index.notes), index.format_version)
    except (msgspec.MsgspecError, ReshardError, IndexError, ValueError):
        return None


def _tensors(index: _Index, *, is_own: bool) -> Mapping[TensorKey, StoredTensor]:
    meshes = [Mesh(*mesh) for mesh in index.meshes]
    layouts = [Layout(meshes[mesh], split) for mesh, split in index.layouts]
    # Files of our own lie in the checkpoint's directory; those of other programs perhaps in one for each rank.
    parts = [[file] if is_own else file.split("/") for file in index.pieces.file_names]
    if not all(is_plain_file_name(part) for file in parts for part in file):
        raise ValueError("a file name that leads out of the checkpoint's directory")
    pieces = decode_pieces(index.pieces, [shape for _, shape, _ in index.arrangements])
    arrangements = [
        Arrangement(by_name(dtype), shape, None if layout < 0 else layouts[layout], own)
        for (dtype, shape, layout), own in zip(index.arrangements, pieces, strict=True)
    ]
    numbers = unpack(index.arranged).tolist()
    if not len(index.names) == len(index.kinds) == len(numbers):
        raise ValueError("tensors without a name, a kind or an arrangement")
    keys = list(_keys(index.names, index.kinds))
    return dict(zip(keys, rows(StoredTensor, keys, index.names, map(arrangements.__getitem__, numbers)), strict=True))


def _keys(names: Sequence[str], kinds: bytes) -> Iterator[TensorKey]:
    """The keys of tensors; those of one kind stand together, mostly."""
    ends = [*(np.flatnonzero(np.diff(np.frombuffer(kinds, np.uint8))) + 1).tolist(), len(kinds)]
    for begin, end in pairwise([0, *ends]):
        yield from parse_tensor_names(names[begin:end], _KINDS[kinds[begin]]) if begin < end else ()
