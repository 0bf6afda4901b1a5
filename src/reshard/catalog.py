"""What a stored checkpoint holds, wherever it came from. Pure data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

from reshard.geometry import DType, Layout, Region
from reshard.geometry.boxes import Boxes
from reshard.geometry.region import strides_of
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
class Window:
    """Elements of a tensor in a file that are not all of it, or lie there in another shape.

    Attributes:
        shape: of the tensor in the file.
        offset: of the first of them, in elements of that tensor in C order.
        strides: from one element to the next along each dimension, in elements; descending, as the file is read.
    """

    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


class _Lying:
    """Where a box of a tensor lies in a tensor in a file."""

    __slots__ = ()

    region: Region
    window: Window | None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the file."""
        return self.region.shape if self.window is None else self.window.shape

    def strides(self, itemsize: int) -> tuple[int, ...]:
        """From one element to the next along each dimension of the box, in bytes of the file."""
        return strides_of(self.region.shape, itemsize) if self.window is None else tuple(n * itemsize for n in self.window.strides)

    def begin(self, itemsize: int) -> int:
        """Where its first element is, in bytes from the first byte of the tensor in the file."""
        return 0 if self.window is None else self.window.offset * itemsize


@dataclass(frozen=True, slots=True)
class Chunk(_Lying):
    """A region together with the places that store it.

    Attributes:
        region: what it holds of the tensor.
        places: where it is stored: one place, or several where replicas were all written.
        holders: the global ranks that held it when it was saved, sorted (the contract's `rank_group`); empty when that isn't known.
        window: as in `Piece`.
    """

    region: Region
    places: tuple[Place, ...]
    holders: tuple[int, ...] = ()
    window: Window | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """A place without the tensor's name, so that tensors that lie alike share it.

    Attributes:
        file: the file's name, relative to the checkpoint's directory.
        rank: the global rank that wrote it.
        suffix: what follows the tensor's own name in the file's header.
    """

    file: str
    rank: int
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Piece(_Lying):
    """A chunk without the tensor's name.

    Attributes:
        region: what it holds of the tensor.
        sites: where it is stored.
        holders: as in `Chunk`.
        window: where its elements lie in the tensor in the file; None where they are that tensor, in C order.
    """

    region: Region
    sites: tuple[Site, ...]
    holders: tuple[int, ...] = ()
    window: Window | None = None


class Pieces(Sequence[Piece]):
    """Pieces that become objects when they are asked for; equal to any sequence of the same ones."""

    @property
    @abstractmethod
    def boxes(self) -> Boxes:
        """Their regions."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))


# Up to so many pieces a loop is faster than arrays that have yet to be made.
_FEW = 8


@dataclass(frozen=True)
class Arrangement:
    """How a tensor lies in a stored checkpoint. Tensors that lie alike share one, so that plans are made once for all of them.

    Caches go by its identity: its hash goes over all its pieces.

    Attributes:
        dtype: the element type of the stored bytes.
        global_shape: the shape of the whole tensor.
        layout: how it lay on its mesh when it was saved; None when that isn't known or no layout can say it.
        pieces: disjoint regions that cover the tensor together.
    """

    dtype: DType
    global_shape: tuple[int, ...]
    layout: Layout | None
    pieces: Sequence[Piece]

    @cached_property
    def boxes(self) -> Boxes:
        """The regions of the pieces."""
        if isinstance(self.pieces, Pieces):
            return self.pieces.boxes
        return Boxes.of([piece.region for piece in self.pieces], len(self.global_shape))

    @cached_property
    def has_windows(self) -> bool:
        """Whether any piece is a part of a tensor in a file; pieces that are made on demand are none."""
        return not isinstance(self.pieces, Pieces) and any(piece.window is not None for piece in self.pieces)

    def touching(self, region: Region) -> Sequence[int]:
        """The indices of the pieces that share an element with a region of the tensor; no other piece is made or looked at one by one."""
        if len(self.pieces) <= _FEW and not isinstance(self.pieces, Pieces):
            return [index for index, piece in enumerate(self.pieces) if region.intersect(piece.region) is not None]
        return self.boxes.touching(region).tolist()


class StoredTensor(NamedTuple):
    """A global tensor of a stored checkpoint.

    Attributes:
        key: what it is.
        name: its name in files.
        arrangement: how it lies.
    """

    key: TensorKey
    name: str
    arrangement: Arrangement

    @property
    def dtype(self) -> DType:
        """The element type of the stored bytes."""
        return self.arrangement.dtype

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self.arrangement.global_shape

    @property
    def layout(self) -> Layout | None:
        """How it lay on its mesh when it was saved; None when that isn't known or no layout can say it."""
        return self.arrangement.layout

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Disjoint regions that cover the tensor together, made anew at each call."""
        return tuple(
            Chunk(
                piece.region,
                tuple(Place(site.file, self.name + site.suffix, site.rank) for site in piece.sites),
                piece.holders,
                piece.window,
            )
            for piece in self.arrangement.pieces
        )

    def of_type(self, dtype: DType) -> StoredTensor:
        """The same tensor as values of another type, which lie nowhere."""
        return self._replace(arrangement=Arrangement(dtype, self.global_shape, None, ()))

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
        format_version: which version of our own additions it was written with; None when another program wrote it. It is no part of what
            a checkpoint holds: catalogs that differ in it alone are equal.
    """

    directory: str
    tensors: Mapping[TensorKey, StoredTensor]
    notes: tuple[str, ...] = field(default=())
    format_version: int | None = field(default=None, compare=False)

    @cached_property
    def arrangements(self) -> tuple[Arrangement, ...]:
        """The ways in which its tensors lie, each object once."""
        found = list(map(_ARRANGEMENT_OF, self.tensors.values()))
        return tuple(dict(zip(map(id, found), found, strict=True)).values())


_ARRANGEMENT_OF: Callable[[StoredTensor], Arrangement] = attrgetter("arrangement")
