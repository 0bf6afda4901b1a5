"""Stored tensors by their chunks, as tests like to write them."""

from __future__ import annotations

from collections.abc import Iterable

from reshard.catalog import Arrangement, Chunk, Piece, Site, StoredTensor
from reshard.format.names import tensor_name
from reshard.geometry import DType, Layout
from reshard.state import TensorKey


def stored_tensor(
    key: TensorKey, dtype: DType, global_shape: tuple[int, ...], layout: Layout | None, chunks: Iterable[Chunk]
) -> StoredTensor:
    """A tensor with an arrangement of its own."""
    # Tests of impossible keys need a tensor too.
    name = tensor_name(key) if key.parameter or key.slot else ""
    pieces = []
    for chunk in chunks:
        assert all(place.name.startswith(name) for place in chunk.places)
        sites = tuple(Site(place.file, place.rank, place.name.removeprefix(name)) for place in chunk.places)
        pieces.append(Piece(chunk.region, sites, chunk.holders))
    return StoredTensor(key, name, Arrangement(dtype, global_shape, layout, tuple(pieces)))
