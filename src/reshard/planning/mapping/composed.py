"""A save through a mapping: a rank's tensors become the parts that they are of the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from reshard.errors import CaptureError
from reshard.format.names import tensor_name
from reshard.geometry import DType, Region
from reshard.planning.mapping.boxes import boxes_of
from reshard.planning.mapping.compositions import Shape
from reshard.planning.mapping.lattice import Face, Lattice, clip, join, part_of
from reshard.planning.mapping.linking import Sides
from reshard.planning.mapping.memory import ComposedMemory, Piece, ViewMemory
from reshard.planning.mapping.names import Named
from reshard.planning.mapping.wanted import face_of
from reshard.state import Kind, Memory, ParameterGroup, Shard, ShardedTensor, State, TensorKey


class _Source(NamedTuple):
    """What a tensor of the checkpoint has of one of the run: the checkpoint's on the left, the run's on the right."""

    name: str
    lattice: Lattice


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor of the checkpoint, and what of the run it is made of, as far as this rank knows."""

    name: str
    shape: Shape
    sources: tuple[_Source, ...]
    fills: tuple[tuple[float, Lattice], ...]

    @property
    def is_renamed(self) -> bool:
        """Whether it is a tensor of the run under another name."""
        return len(self.sources) == 1 and self.sources[0].lattice.is_identity


def compose(state: State, sides: Sides, *, is_same_everywhere: bool = False) -> State:
    """A rank's state under the checkpoint's names. Local: what the rank doesn't hold of a tensor other ranks do.

    Each shard is a box of the checkpoint's tensor; its memory is gathered when it is read. What a rank holds becomes as few boxes as can be
    told without asking others: parts of tensors that lie alike on the ranks are put together, others stay apart, since another rank may
    hold one of them and not the other. What rules fill is everyone's who has any of the tensor. Slots of a parameter's shape follow it; one
    number (a step count) is that of the first of the parameters that a tensor is made of.

    Args:
        state: under the run's names.
        sides: the mapping.
        is_same_everywhere: whether every rank holds the same parts of the same tensors as this one.

    Raises:
        CaptureError: elements that the checkpoint's naming has no place for; parameters of one tensor that differ in element type or
            hyper-parameters.
        UsageError: shapes that contradict the configuration, or a size that isn't known.
    """
    model = {key.parameter: tensor for key, tensor in state.tensors.items() if key.kind is Kind.MODEL}
    made = _made(model, sides)
    composer = _Composer(is_same_everywhere)
    tensors: dict[TensorKey, ShardedTensor] = {}
    updated: set[TensorKey] = set()
    slots = list(dict.fromkeys(key.slot for key in state.tensors if key.kind is Kind.OPTIMIZER and key.parameter))
    placed: set[TensorKey] = set()
    for one in made:
        for slot in (None, *slots):
            kind = Kind.MODEL if slot is None else Kind.OPTIMIZER
            keys = [TensorKey(kind, slot, source.name) for source in one.sources]
            held = [state.tensors[key] for key in dict.fromkeys(keys) if key in state.tensors]
            if not held:
                continue
            own = composer.tensor(TensorKey(kind, slot, one.name), one, keys, state.tensors, held)
            if own is not None:
                tensors[own.key] = own
                placed.update(keys)
                if all(tensor.key in state.updated for tensor in held):
                    updated.add(own.key)
    for key, tensor in state.tensors.items():
        if key not in placed:
            # Slots of another shape, and what belongs to no parameter.
            tensors.setdefault(key, tensor)
            if key in state.updated:
                updated.add(key)
    return replace(state, tensors=tensors, groups=_groups(state.groups, made), updated=frozenset(updated))


def _made(model: Mapping[str, ShardedTensor], sides: Sides) -> list[_Made]:
    """The checkpoint's model tensors of which this rank may hold a part, in the order of the run's."""
    providers: dict[str, list[tuple[str, Lattice]]] = {}
    atoms: dict[str, Shape] = {}
    for name, tensor in model.items():
        named, shapes = sides.run.take_apart(name, tensor.global_shape, sides.sizes)
        atoms.update(shapes)
        for atom, lattice in named.parts:
            providers.setdefault(atom, []).append((name, lattice))
    assembled = sides.checkpoint.assemble(sides.checkpoint.completed(atoms, sides.sizes), sides.sizes)
    if assembled.incomplete:
        name, lacking = next(iter(assembled.incomplete.items()))
        raise CaptureError(
            "a tensor of the checkpoint is also made of tensors whose shapes this rank can't know",
            tensor=name,
            found=", ".join(lacking[:4]),
            fix="give the mapping shares from which the shapes of all parts follow, or save without the mapping",
        )
    joined: dict[tuple[int, int], list[Lattice]] = {}
    made = [_sourced(named, providers, joined) for named in assembled.tensors.values()]
    _check_all_placed(model, made, sides)
    return made


def _sourced(named: Named, providers: Mapping[str, Sequence[tuple[str, Lattice]]], joined: dict[tuple[int, int], list[Lattice]]) -> _Made:
    sources: list[_Source] = []
    for atom, lattice in named.parts:
        for name, other in providers.get(atom, ()):
            common = joined.get((id(lattice), id(other)))
            if common is None:
                common = joined[id(lattice), id(other)] = join(lattice, other)
            sources += [_Source(name, part) for part in common]
    return _Made(named.name, named.shape, tuple(sources), named.fills)


def _check_all_placed(model: Mapping[str, ShardedTensor], made: Iterable[_Made], sides: Sides) -> None:
    """See that every element of the run comes to one place in the checkpoint. What a fill added on the run's side comes to none."""
    placed: dict[str, int] = dict.fromkeys(model, 0)
    for one in made:
        for source in one.sources:
            placed[source.name] += source.lattice.size
    for name, count in placed.items():
        whole = prod(model[name].global_shape)
        if count == whole:
            continue
        named, _ = sides.run.take_apart(name, model[name].global_shape, sides.sizes)
        if count + sum(lattice.size for _, lattice in named.fills) != whole:
            holders = [one.name for one in made if any(source.name == name for source in one.sources)]
            raise CaptureError(
                "elements of a tensor would be lost" if count < whole else "elements of a tensor would be saved twice",
                tensor=name,
                found=f"{count} elements in {', '.join(holders[:4]) or 'no tensor'}",
                expected=f"{whole}, each once",
                fix="save with a mapping whose rules cover the whole tensor",
            )


class _Plan(NamedTuple):
    """A shard of a composed tensor: its region, and of each piece which source and shard it is of, where it lies there, and where here; of
    what is filled the value, and where it lies.
    """

    region: Region
    pieces: tuple[tuple[int, int, Shape, Face, Face], ...]
    fills: tuple[tuple[float, Shape, Face], ...]


class _Composer:
    """Composes tensors; where parts lie is found once for all that are made alike and held alike."""

    def __init__(self, is_same_everywhere: bool) -> None:
        self._is_same_everywhere = is_same_everywhere
        self._known: dict[tuple[object, ...], list[_Plan]] = {}

    def tensor(
        self, key: TensorKey, one: _Made, keys: Sequence[TensorKey], tensors: Mapping[TensorKey, ShardedTensor], held: list[ShardedTensor]
    ) -> ShardedTensor | None:
        """One tensor of the checkpoint; None when its parts have other shapes than their parameters and can't follow them.

        Args:
            key: the tensor's.
            one: how it is made.
            keys: of each of its sources the tensor of the run.
            tensors: the run's.
            held: those of them that there are.
        """
        if one.is_renamed:
            return held[0]._replace(key=key)
        if any(
            tensors[own].global_shape != source.lattice.right.shape for own, source in zip(keys, one.sources, strict=True) if own in tensors
        ):
            return held[0]._replace(key=key) if all(prod(tensor.global_shape) == 1 for tensor in held) else None
        if len({tensor.dtype.name for tensor in held}) > 1:
            raise CaptureError(
                "parameters of different element types would be one tensor of the checkpoint",
                tensor=tensor_name(key),
                found=", ".join(f"{tensor_name(tensor.key)}: {tensor.dtype}" for tensor in held[:4]),
                fix="give them one type, or save without the mapping",
            )
        shards = tuple(self._shards(one, keys, tensors, held[0].dtype))
        return ShardedTensor(key, held[0].dtype, one.shape, None, shards)

    def _shards(self, one: _Made, keys: Sequence[TensorKey], tensors: Mapping[TensorKey, ShardedTensor], dtype: DType) -> Iterator[Shard]:
        regions = [tuple(shard.region for shard in tensors[key].shards) if key in tensors else () for key in keys]
        kins = [_kin(tensors[key]) if key in tensors and not self._is_same_everywhere else None for key in keys]
        alike = (
            one.shape,
            tuple(id(lattice) for _, lattice in (*one.sources, *one.fills)),
            tuple(tuple(map(id, own)) for own in regions),
            tuple(kins),
        )
        plans = self._known.get(alike)
        if plans is None:
            plans = self._known[alike] = _plans(one, regions, kins, is_same_everywhere=self._is_same_everywhere)
        for region, pieces, fills in plans:
            views = [
                Piece(ViewMemory(tensors[keys[source]].shards[shard].memory, dtype, extents, there), here)
                for source, shard, extents, there, here in pieces
            ]
            yield Shard(region, _memory(dtype, region, views, fills))


def _memory(dtype: DType, region: Region, pieces: list[Piece], fills: tuple[tuple[float, Shape, Face], ...]) -> Memory:
    if len(pieces) == 1 and not fills:
        view, face = pieces[0]
        if view.extents == region.shape and face.dims == tuple(range(len(region.shape))) and set(face.steps) <= {1}:
            return view
    return ComposedMemory(dtype, region.shape, tuple(pieces), fills)


# Of tensors that lie alike: a mesh, and which of its axes split them; of any other tensor None.
_Kin = tuple[object, frozenset[int]] | None


def _kin(tensor: ShardedTensor) -> _Kin:
    """How a tensor lies on the ranks, as far as it says whether ranks that share a part of it share all: those that are at the same place
    along the axes that split it hold the same, all others hold nothing of that.
    """
    if tensor.layout is None or len(tensor.shards) != 1:
        return None
    return tensor.layout.mesh, frozenset(axis for axes in tensor.layout.split for axis in axes)


def _plans(one: _Made, regions: Sequence[Sequence[Region]], kins: Sequence[_Kin], *, is_same_everywhere: bool) -> list[_Plan]:
    groups: dict[object, list[tuple[int, int, Region, Lattice]]] = {}
    for index, source in enumerate(one.sources):
        for shard, region in enumerate(regions[index]):
            kin = kins[index]
            group = None if is_same_everywhere else (source.name, shard) if kin is None else kin
            for box in clip(source.lattice.extents, source.lattice.right, region):
                groups.setdefault(group, []).append((index, shard, region, part_of(source.lattice, box)))
    if not groups:
        return []
    filled = [(lattice.extents, lattice.left) for _, lattice in one.fills]
    found: list[_Plan] = []
    for parts in groups.values():
        own = [(lattice.extents, lattice.left) for *_, lattice in parts]
        found += [_plan(one, box, parts) for box in boxes_of([*own, *filled] if is_same_everywhere else own, one.shape)]
    if not is_same_everywhere and filled:
        found += [_plan(one, box, ()) for box in boxes_of(filled, one.shape)]
    return found


def _plan(one: _Made, box: Region, parts: Sequence[tuple[int, int, Region, Lattice]]) -> _Plan:
    pieces = tuple(
        (index, shard, inner.shape, face_of(lattice.right, inner, region), face_of(lattice.left, inner, box))
        for index, shard, region, lattice in parts
        for inner in clip(lattice.extents, lattice.left, box)
    )
    fills = tuple(
        (value, inner.shape, face_of(lattice.left, inner, box))
        for value, lattice in one.fills
        for inner in clip(lattice.extents, lattice.left, box)
    )
    return _Plan(box, pieces, fills)


def _groups(groups: Sequence[ParameterGroup], made: Sequence[_Made]) -> tuple[ParameterGroup, ...]:
    """Hyper-parameters by the checkpoint's names.

    Raises:
        CaptureError: parameters of one tensor are in different groups.
    """
    number = {name: index for index, group in enumerate(groups) for name in group.parameters}
    unstepped = {name for group in groups for name in group.unstepped}
    parameters: list[list[str]] = [[] for _ in groups]
    still: list[list[str]] = [[] for _ in groups]
    for one in made:
        names = [name for name in dict.fromkeys(source.name for source in one.sources) if name in number]
        if not names:
            continue
        indices = {number[name] for name in names}
        if len(indices) > 1:
            raise CaptureError(
                "parameters with different hyper-parameters would be one tensor of the checkpoint",
                tensor=one.name,
                found=", ".join(names[:4]),
                fix="put them into one group of the optimizer, or save without the mapping",
            )
        index = indices.pop()
        parameters[index].append(one.name)
        if all(name in unstepped for name in names):
            still[index].append(one.name)
    return tuple(
        replace(group, parameters=tuple(own), unstepped=tuple(none)) for group, own, none in zip(groups, parameters, still, strict=True)
    )
