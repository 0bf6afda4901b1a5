"""Which rank writes which region to which file, and what the checkpoint will then hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reshard.catalog import Arrangement, Catalog, Piece, Site, StoredTensor
from reshard.errors import CaptureError, LayoutError
from reshard.format.names import data_file_name, tensor_name
from reshard.geometry import DType, Layout, Mesh, Region
from reshard.geometry.cover import cover_fault
from reshard.geometry.tensor_map import slices_of
from reshard.planning.agreement import RankDescription, TensorDescription
from reshard.state import Kind, TensorKey


@dataclass(frozen=True, slots=True)
class WriteEntry:
    """A tensor of a file.

    Attributes:
        name: its name in the file.
        key: the tensor of the state that it is a part of.
        shard: which of the state's shards; for a tensor without elements it doesn't matter, there may be none.
        dtype: the element type.
        shape: the shape in the file: the shard's.
    """

    name: str
    key: TensorKey
    shard: int
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FilePlan:
    """A data file of one rank.

    Attributes:
        file_name: its name in the checkpoint's directory.
        kind: what it holds.
        entries: its tensors, in the order of the state; there may be none.
    """

    file_name: str
    kind: Kind
    entries: tuple[WriteEntry, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return sum(entry.dtype.itemsize * Region.whole(entry.shape).size for entry in self.entries)


def plan_rank_files(description: RankDescription, world_size: int, prefix: str | None, save_optimizer: bool) -> tuple[FilePlan, ...]:
    """The files of one rank: all that it holds, replicas included.

    Every rank writes a model file, and an optimizer file when `save_optimizer` says so, be it empty: the contract counts the files by rank.

    Args:
        description: what the rank holds.
        world_size: the number of ranks.
        prefix: the first part of the files' names.
        save_optimizer: whether there are optimizer files.

    Raises:
        CaptureError: two tensors of one file have the same name, or a key has no name in files.
        UsageError: the prefix can't be part of a file name.
    """
    plans = []
    for kind in Kind:
        if kind is Kind.OPTIMIZER and not save_optimizer:
            continue
        entries = tuple(
            WriteEntry(name, tensor.key, index, tensor.dtype, region.shape)
            for tensor in description.tensors
            if tensor.key.kind is kind
            for name, index, region in _stored_parts(tensor, tensor_name(tensor.key))
        )
        names = {entry.name for entry in entries}
        if len(names) < len(entries):
            raise _name_taken(entries, description.rank)
        plans.append(FilePlan(data_file_name(prefix, kind, description.rank, world_size), kind, entries))
    return tuple(plans)


def plan_catalog(descriptions: Sequence[RankDescription], prefix: str | None, save_optimizer: bool, directory: str) -> Catalog:
    """What the checkpoint holds when every rank has written its files.

    Tensors come rank by rank, a rank's model tensors first, each where it appears first. A layout that splits evenly is kept: the first
    rank's, when several stages own the tensor. A tensor that is split evenly without a layout gets one; any other has none, its chunks say
    where they lie.

    Args:
        descriptions: every rank's, in rank order.
        prefix: as in `plan_rank_files`.
        save_optimizer: as in `plan_rank_files`.
        directory: where the files will lie.

    Raises:
        CaptureError: the ranks' parts of a tensor don't make up the whole, or a part is not where its layout says.
        UsageError: the prefix can't be part of a file name.
    """
    parts: dict[TensorKey, list[tuple[int, TensorDescription]]] = {}
    for description in descriptions:
        for kind in Kind:
            if kind is Kind.OPTIMIZER and not save_optimizer:
                continue
            for tensor in description.tensors:
                if tensor.key.kind is kind:
                    parts.setdefault(tensor.key, []).append((description.rank, tensor))
    files = {(d.rank, kind): data_file_name(prefix, kind, d.rank, len(descriptions)) for d in descriptions for kind in Kind}
    # Most tensors lie like many others, and share a description's holding with them.
    known: dict[object, Arrangement] = {}
    tensors = {}
    for key, held in parts.items():
        first = held[0][1]
        alike = (key.kind, *[(rank, id(tensor.holding)) for rank, tensor in held])
        arrangement = known.get(alike)
        if arrangement is None:
            spread = _arrange(held)
            pieces = tuple(
                Piece(part.region, tuple(Site(files[rank, key.kind], rank, suffix) for rank, suffix in part.places), part.holders)
                for part in spread.pieces
            )
            arrangement = known[alike] = Arrangement(first.dtype, first.global_shape, spread.layout, pieces)
        tensors[key] = StoredTensor(key, tensor_name(key), arrangement)
    return Catalog(directory, tensors)


@dataclass(frozen=True, slots=True)
class _Part:
    """A chunk without the tensor's name: its region, which ranks write it under which suffix, which hold it."""

    region: Region
    places: tuple[tuple[int, str], ...]
    holders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Spread:
    """How a tensor lies, without its name and type."""

    layout: Layout | None
    pieces: tuple[_Part, ...]


def _stored_parts(tensor: TensorDescription, name: str) -> Iterator[tuple[str, int, Region]]:
    """What a rank writes of a tensor: the name in the file, the index of the shard, its region.

    Parts without elements are not written. A tensor without elements is, whole, by every rank that has it: it must come back.
    """
    if 0 in tensor.global_shape:
        yield name, 0, Region.whole(tensor.global_shape)
        return
    written = 0
    for index, region in enumerate(tensor.regions):
        if not region.is_empty:
            yield (f"{name}@{written}" if written else name), index, region
            written += 1


def _name_taken(entries: Sequence[WriteEntry], rank: int) -> CaptureError:
    count = Counter(entry.name for entry in entries)
    name = count.most_common(1)[0][0]
    return CaptureError(
        "two tensors of one rank have the same name in files",
        tensor=name,
        rank=rank,
        found=", ".join(str(tuple(entry.key)) for entry in entries if entry.name == name),
        fix="rename one of them; of a tensor with several parts on a rank the further ones are named with @1, @2, …",
    )


def _arrange(held: Sequence[tuple[int, TensorDescription]]) -> _Spread:
    first = held[0][1]
    shape = first.global_shape
    pieces = _collect(held)
    if 0 in shape:
        return _Spread(None, tuple(pieces))
    for rank, tensor in held:
        _check_place(rank, tensor)
    layout = first.layout
    if layout is not None:
        # Another stage may hold the same tensor in other parts, of the same values: the first stage's are enough.
        own = {region for _, tensor in held if tensor.layout and tensor.layout.mesh == layout.mesh for region in tensor.regions}
        if cover_fault(list(own), shape) is None:
            pieces = [piece for piece in pieces if piece.region in own]
    fault = cover_fault([piece.region for piece in pieces], shape)
    if fault is not None:
        raise CaptureError(
            "the ranks' parts of a tensor don't make up the whole tensor",
            tensor=tensor_name(first.key),
            found=fault,
            expected=f"parts that together are all of {list(shape)}, each element in one part or in equal ones",
            fix="every rank of the run must save, and tensors that are different must have different names",
        )
    if layout is None:
        layout = _layout_of_grid(pieces, shape) if len(pieces) > 1 else None
    elif not layout.is_even(shape) or any(len(tensor.regions) != 1 for _, tensor in held if tensor.layout):
        layout = None
    if layout is not None:
        order = {region: index for index, region in enumerate(slices_of(layout, shape).values())}
        pieces.sort(key=lambda piece: order[piece.region])
    return _Spread(layout, tuple(pieces))


def _collect(held: Sequence[tuple[int, TensorDescription]]) -> list[_Part]:
    """The different regions, in the order of the ranks, each with everyone who has it."""
    found: dict[Region, list[tuple[int, str]]] = {}
    for rank, tensor in held:
        for suffix, _, region in _stored_parts(tensor, ""):
            found.setdefault(region, []).append((rank, suffix))
    return [_Part(region, tuple(places), tuple(sorted({rank for rank, _ in places}))) for region, places in found.items()]


def _check_place(rank: int, tensor: TensorDescription) -> None:
    """See that a rank's only part is where its layout says; when it isn't, one of the two would be written down wrong."""
    if tensor.layout is None or len(tensor.regions) != 1:
        return
    try:
        expected = tensor.layout.rank_region(rank, tensor.global_shape)
    except LayoutError as error:
        raise CaptureError(error.what, tensor=tensor_name(tensor.key), rank=rank, found=error.found, expected=error.expected) from error
    if expected != tensor.regions[0] and not (expected.is_empty and tensor.regions[0].is_empty):
        raise CaptureError(
            "a rank's part of a tensor is not where its layout says",
            tensor=tensor_name(tensor.key),
            rank=rank,
            found=tensor.regions[0],
            expected=expected,
        )


def _layout_of_grid(pieces: Sequence[_Part], shape: tuple[int, ...]) -> Layout | None:
    """A layout that says what pieces without one show: equal parts in an even grid, each on as many ranks, each rank with one part.

    Its mesh is made up; the regions that it gives each rank are the true ones.
    """
    part = pieces[0].region.shape
    replicas = len(pieces[0].holders)
    ranks = [rank for piece in pieces for rank in piece.holders]
    if len(set(ranks)) < len(ranks) or any(piece.region.shape != part or len(piece.holders) != replicas for piece in pieces):
        return None
    for piece in pieces:
        if any(o % extent or size % extent for o, extent, size in zip(piece.region.offset, part, shape, strict=True)):
            return None
    ordered = sorted(pieces, key=lambda piece: piece.region.offset)
    counts = [size // extent for size, extent in zip(shape, part, strict=True)]
    split = [dimension for dimension, count in enumerate(counts) if count > 1]
    mesh = Mesh(
        (replicas, *(counts[dimension] for dimension in split)),
        ("replica", *(f"split{dimension}" for dimension in split)),
        tuple(piece.holders[replica] for replica in range(replicas) for piece in ordered),
    )
    return Layout(mesh, tuple((1 + split.index(d),) if d in split else () for d in range(len(shape))))
