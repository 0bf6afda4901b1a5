"""A load through a mapping: the checkpoint's catalog and the run's state are both told in strands, and the rest of a load is as ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from reshard.catalog import Arrangement, Catalog, Piece, StoredTensor, Window
from reshard.format.names import tensor_name
from reshard.geometry import Region
from reshard.planning.mapping.lattice import Face, Lattice, clip, moved
from reshard.planning.mapping.linking import Linked, Links
from reshard.planning.mapping.memory import ViewMemory
from reshard.planning.read_plan import Mismatch
from reshard.state import Kind, ParameterGroup, Shard, ShardedTensor, State, TensorKey


@dataclass(frozen=True)
class Told:
    """A checkpoint's catalog in strands. The same on every rank.

    Attributes:
        catalog: by the strands' keys; what no strand is about has the key that it has in the checkpoint.
        links: what the strands are.
        run: of each strand's key the run's tensor.
        stored: of each key of the catalog the checkpoint's tensor.
    """

    catalog: Catalog
    links: Links
    run: Mapping[TensorKey, TensorKey]
    stored: Mapping[TensorKey, TensorKey]

    def run_key(self, key: TensorKey) -> TensorKey:
        """The run's tensor that a key is about."""
        return self.run.get(key, key)

    def as_run(self, catalog: Catalog) -> Catalog:
        """What the checkpoint holds under the run's names: shapes and element types, but no pieces."""
        tensors: dict[TensorKey, StoredTensor] = {}
        for key, one in self.links.tensors.items():
            if one.strands:
                first = catalog.tensors[one.strands[0].stored]
                arrangement = first.arrangement if one.only is not None else Arrangement(first.dtype, one.shape, None, ())
                tensors[key] = StoredTensor(key, tensor_name(key), arrangement)
        return replace(catalog, tensors=tensors)


def tell(catalog: Catalog, links: Links) -> Told:
    """A checkpoint's catalog in strands.

    Args:
        catalog: what it holds.
        links: of this catalog.
    """
    tensors: dict[TensorKey, StoredTensor] = {}
    run: dict[TensorKey, TensorKey] = {}
    stored: dict[TensorKey, TensorKey] = {}
    arranger = _Arranger()
    for key, one in links.tensors.items():
        for strand in one.strands:
            tensor = catalog.tensors[strand.stored]
            tensors[strand.key] = StoredTensor(strand.key, tensor.name, arranger.arrange(strand.lattice, tensor.arrangement))
            run[strand.key], stored[strand.key] = key, strand.stored
    for key in links.unused:
        if key not in links.ignored:
            taken = key if key not in tensors else key._replace(parameter=f"{key.parameter} (in the checkpoint)")
            tensors[taken] = catalog.tensors[key]
            stored[taken] = key
    return Told(replace(catalog, tensors=tensors), links, run, stored)


class _Arranger:
    """Arrangements of strands, each made once for all that are linked alike and stored alike."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Arrangement] = {}
        # Where a strand lies in a piece doesn't depend on the file.
        self._lying: dict[tuple[int, Region, Window | None], list[tuple[Region, Window]]] = {}

    def arrange(self, lattice: Lattice, arrangement: Arrangement) -> Arrangement:
        """How a strand lies in files."""
        if lattice.is_identity:
            return arrangement
        alike = (id(lattice), id(arrangement))
        found = self._known.get(alike)
        if found is None:
            found = self._known[alike] = Arrangement(arrangement.dtype, lattice.extents, None, tuple(self._pieces(lattice, arrangement)))
        return found

    def _pieces(self, lattice: Lattice, arrangement: Arrangement) -> list[Piece]:
        pieces = []
        for piece in arrangement.pieces:
            alike = (id(lattice), piece.region, piece.window)
            lying = self._lying.get(alike)
            if lying is None:
                lying = self._lying[alike] = list(_windows(lattice, piece))
            pieces += [Piece(box, piece.sites, piece.holders, window) for box, window in lying]
        return pieces


def _windows(lattice: Lattice, piece: Piece) -> Iterator[tuple[Region, Window]]:
    """What a piece has of a strand: boxes of the strand, and where each lies in the tensor in the file."""
    strides = piece.strides(1)
    for box in clip(lattice.extents, lattice.right, piece.region):
        begun = moved(lattice.right, box.offset)
        offset = tuple(a - b for a, b in zip(begun.offset, piece.region.offset, strict=True))
        begin = piece.begin(1) + sum(o * stride for o, stride in zip(offset, strides, strict=True))
        steps = tuple(strides[d] * step for d, step in zip(begun.dims, begun.steps, strict=True))
        yield box, Window(piece.stored_shape, begin, steps)


@dataclass(frozen=True)
class Asked:
    """A run's state in strands.

    Attributes:
        state: by the strands' keys; what the checkpoint doesn't have keeps its own.
        mismatched: the run's tensors of another shape than the checkpoint's parts make.
        fills: what is to be written before anything is read: memory, and the value.
    """

    state: State
    mismatched: tuple[Mismatch, ...] = ()
    fills: tuple[tuple[Shard, float], ...] = field(default=())


def ask(state: State, links: Links, takes: Callable[[TensorKey], bool]) -> Asked:
    """A run's state in strands.

    Args:
        state: what this rank wants to fill.
        links: of the checkpoint, under the run's naming.
        takes: which of the run's tensors are wanted at all.
    """
    tensors: dict[TensorKey, ShardedTensor] = {}
    mismatched: list[Mismatch] = []
    fills: list[tuple[Shard, float]] = []
    viewer = _Viewer()
    for key, tensor in state.tensors.items():
        if not takes(key):
            continue
        one = links.tensors.get(key)
        if one is None or not one.strands:
            tensors[key] = tensor
        elif one.shape != tensor.global_shape:
            mismatched.append(Mismatch(key, "shape", str(list(one.shape)), str(list(tensor.global_shape))))
        elif one.only is not None:
            tensors[one.only.key] = tensor._replace(key=one.only.key)
        else:
            viewer.add(tensor, one, tensors)
            for value, lattice in one.fills:
                fills += [(shard, value) for shard in viewer.shards(tensor, lattice)]
    return Asked(replace(state, tensors=tensors), tuple(mismatched), tuple(fills))


class _Viewer:
    """Shards as views of memory; where they lie is found once for all tensors that are linked alike and held alike."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], list[tuple[Region, Face]]] = {}

    def add(self, tensor: ShardedTensor, one: Linked, tensors: dict[TensorKey, ShardedTensor]) -> None:
        """The strands of a tensor."""
        for strand in one.strands:
            shards = tuple(self.shards(tensor, strand.lattice))
            tensors[strand.key] = ShardedTensor(strand.key, tensor.dtype, strand.lattice.extents, None, shards)

    def shards(self, tensor: ShardedTensor, lattice: Lattice) -> Iterator[Shard]:
        """What a tensor's shards have of a lattice on whose left it is."""
        for shard in tensor.shards:
            for box, face in self._boxes(lattice, shard.region):
                yield Shard(box, ViewMemory(shard.memory, tensor.dtype, box.shape, face))

    def _boxes(self, lattice: Lattice, region: Region) -> list[tuple[Region, Face]]:
        """What a region has of a lattice: boxes of its coordinates, and where they lie in the region."""
        alike = (id(lattice), id(region))
        found = self._known.get(alike)
        if found is None:
            found = self._known[alike] = [(box, face_of(lattice.left, box, region)) for box in clip(lattice.extents, lattice.left, region)]
        return found


def face_of(face: Face, box: Region, region: Region) -> Face:
    """Where a box of a lattice lies in a region of a face's tensor."""
    begun = moved(face, box.offset)
    return Face(region.shape, tuple(a - b for a, b in zip(begun.offset, region.offset, strict=True)), begun.dims, begun.steps)


def run_groups(groups: Sequence[ParameterGroup], told: Told) -> tuple[ParameterGroup, ...]:
    """The checkpoint's hyper-parameters for the run's parameters: those of the first tensor that each is made of.

    A parameter is unstepped when all that it is made of is.
    """
    number = {name: index for index, group in enumerate(groups) for name in group.parameters}
    unstepped = {name for group in groups for name in group.unstepped}
    parameters: list[list[str]] = [[] for _ in groups]
    still: list[list[str]] = [[] for _ in groups]
    for key, one in told.links.tensors.items():
        if key.kind is not Kind.MODEL:
            continue
        names = [strand.stored.parameter for strand in one.strands]
        index = next((number[name] for name in names if name in number), None)
        if index is not None:
            parameters[index].append(key.parameter)
            if all(name in unstepped for name in names):
                still[index].append(key.parameter)
    for key in told.links.unused:
        if key.kind is Kind.MODEL and key.parameter in number:
            parameters[number[key.parameter]].append(key.parameter)
    return tuple(
        replace(group, parameters=tuple(own), unstepped=tuple(none)) for group, own, none in zip(groups, parameters, still, strict=True)
    )
