"""What a stored checkpoint holds, wherever it came from. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reshard.geometry import DType, Layout, Region
from reshard.state import TensorKey


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in a file.

    Attributes:
        file: the file's name, relative to the checkpoint's directory.
        name: the tensor's name in the file's header.
        rank: the global rank that wrote it.
    """

    file: str
    name: str
    rank: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A region together with the places that store it.

    Attributes:
        region: what it holds of the tensor.
        places: where it is stored: one place, or several where replicas were all written.
        holders: the global ranks that held it when it was saved, sorted (the contract's `rank_group`); empty when that isn't known.
    """

    region: Region
    places: tuple[Place, ...]
    holders: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A global tensor of a stored checkpoint.

    Attributes:
        key: what it is.
        dtype: the element type of the stored bytes.
        global_shape: the shape of the whole tensor.
        layout: how it lay on its mesh when it was saved; None when that isn't known or no layout can say it.
        chunks: disjoint regions that cover the tensor together.
    """

    key: TensorKey
    dtype: DType
    global_shape: tuple[int, ...]
    layout: Layout | None
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor."""
        return self.dtype.itemsize * Region.whole(self.global_shape).size


@dataclass(frozen=True)
class Catalog:
    """Everything that a stored checkpoint holds in tensors.

    Attributes:
        directory: where its files lie.
        tensors: by key.
        notes: what the reader should know (tensors that metadata doesn't list, a missing metadata file that was made up for).
    """

    directory: str
    tensors: Mapping[TensorKey, StoredTensor]
    notes: tuple[str, ...] = field(default=())
