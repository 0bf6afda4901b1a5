"""How the tensors of a model and its optimizer lie on the ranks of a strategy: layouts by name and shape, without a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from reshard.errors import UsageError
from reshard.geometry import DType, Layout, Mesh
from reshard.geometry.boxes import Boxes
from reshard.planning.agreement import Holding, RankDescription, TensorTable
from reshard.planning.naming import ParameterName, stage_of_layer, understand
from reshard.planning.strategy import Strategy
from reshard.state import Kind, TensorKey


class GlobalTensor(Protocol):
    """What is asked of a tensor that is to be laid out. A `StoredTensor` and a `TensorDescription` have it."""

    @property
    def key(self) -> TensorKey:
        """What it is."""
        ...

    @property
    def dtype(self) -> DType:
        """The element type."""
        ...

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        ...


class WantedTensor(NamedTuple):
    """A tensor that a run would hold."""

    key: TensorKey
    dtype: DType
    global_shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorsAlike:
    """Tensors of the same dtype, shape and layout.

    Attributes:
        dtype: the element type.
        global_shape: the shape of each.
        layout: how each lies.
        members: the tensors, as indices.
    """

    dtype: DType
    global_shape: tuple[int, ...]
    layout: Layout
    members: list[int]

    @cached_property
    def ranks(self) -> np.ndarray:
        """The ranks of the mesh: int64."""
        return np.asarray(self.layout.mesh.ranks, np.int64)

    @cached_property
    def boxes(self) -> Boxes:
        """What each of these ranks holds."""
        return self.layout.regions(self.global_shape)

    @cached_property
    def places(self) -> np.ndarray:
        """The layout's slice ids: the same number where the same region is held."""
        return self.layout.slice_ids()

    def holding(self, rank: int) -> Holding:
        """What a rank of the mesh holds of each; the same object for all that hold the same region."""
        position = self.layout.mesh.position(rank)
        place = int(self.places[position])
        holding = self._holdings.get(place)
        if holding is None:
            regions = (self.layout.region(position, self.global_shape),)
            holding = self._holdings[place] = Holding(self.dtype, self.global_shape, self.layout, regions)
        return holding

    @cached_property
    def _holdings(self) -> dict[int, Holding]:
        return {}


class _Order(NamedTuple):
    """The tensors that some ranks have: their keys, the kinds that occur, and of each tensor the index of its kind."""

    keys: tuple[TensorKey, ...]
    kinds: tuple[TensorsAlike, ...]
    numbers: np.ndarray


@dataclass(frozen=True)
class Placement:
    """The tensors of a job, laid out.

    Attributes:
        strategy: the strategy.
        tensors: the tensors.
        layouts: of each; tensors that lie alike share one object. Its mesh has the ranks that hold the tensor.
    """

    strategy: Strategy
    tensors: tuple[GlobalTensor, ...]
    layouts: tuple[Layout, ...]

    def describe(self, rank: int) -> RankDescription:
        """What a rank holds: its regions of the tensors that it has at all, in their order.

        Ranks that hold the same share the objects that say so.

        Raises:
            UsageError: the strategy has no such rank.
        """
        if not 0 <= rank < self.strategy.world_size:
            raise UsageError(
                "the strategy has no such rank",
                field="rank",
                found=rank,
                expected=f"0 to {self.strategy.world_size - 1} under {self.strategy}",
            )
        meshes = self._meshes_of_rank[rank]
        order = self._order(meshes)
        held = tuple(kind.holding(rank) for kind in order.kinds)
        alike = (meshes, *map(id, held))
        table = self._tables.get(alike)
        if table is None:
            table = self._tables[alike] = TensorTable(order.keys, held, order.numbers)
        return RankDescription(rank, table)

    def only(self, takes: Callable[[TensorKey], bool]) -> Placement:
        """The same placement of some of the tensors."""
        kept = [pair for pair in zip(self.tensors, self.layouts, strict=True) if takes(pair[0].key)]
        return Placement(self.strategy, tuple(tensor for tensor, _ in kept), tuple(layout for _, layout in kept))

    @cached_property
    def meshes(self) -> tuple[Mesh, ...]:
        """The meshes of all layouts, each object once."""
        return tuple({id(layout.mesh): layout.mesh for layout in self.layouts}.values())

    @cached_property
    def kinds(self) -> tuple[TensorsAlike, ...]:
        """The tensors in groups of the same dtype, shape and layout, by their first ones."""
        found: dict[tuple[int, str, tuple[int, ...]], TensorsAlike] = {}
        for index, (tensor, layout) in enumerate(zip(self.tensors, self.layouts, strict=True)):
            alike = (id(layout), tensor.dtype.name, tensor.global_shape)
            kind = found.get(alike)
            if kind is None:
                kind = found[alike] = TensorsAlike(tensor.dtype, tensor.global_shape, layout, [])
            kind.members.append(index)
        return tuple(found.values())

    @cached_property
    def _meshes_of_rank(self) -> list[tuple[int, ...]]:
        found: list[list[int]] = [[] for _ in range(self.strategy.world_size)]
        for number, mesh in enumerate(self.meshes):
            for rank in mesh.ranks:
                found[rank].append(number)
        return [tuple(meshes) for meshes in found]

    @cached_property
    def _kinds_of_mesh(self) -> list[list[int]]:
        numbers = {id(mesh): number for number, mesh in enumerate(self.meshes)}
        found: list[list[int]] = [[] for _ in self.meshes]
        for number, kind in enumerate(self.kinds):
            found[numbers[id(kind.layout.mesh)]].append(number)
        return found

    @cached_property
    def _orders(self) -> dict[tuple[int, ...], _Order]:
        return {}

    @cached_property
    def _tables(self) -> dict[tuple[object, ...], TensorTable]:
        return {}

    def _order(self, meshes: tuple[int, ...]) -> _Order:
        """The tensors on some meshes."""
        order = self._orders.get(meshes)
        if order is None:
            distinct = [kind for mesh in meshes for kind in self._kinds_of_mesh[mesh]]
            pairs = sorted((index, number) for number, kind in enumerate(distinct) for index in self.kinds[kind].members)
            order = self._orders[meshes] = _Order(
                tuple(self.tensors[index].key for index, _ in pairs),
                tuple(self.kinds[kind] for kind in distinct),
                np.array([number for _, number in pairs], np.int64),
            )
        return order

    @cached_property
    def classes(self) -> tuple[tuple[int, ...], ...]:
        """The ranks in classes that hold the same regions of the same tensors; ascending, by their first ranks."""
        labels = np.zeros(self.strategy.world_size, np.int64)
        free = 1
        for layout in {id(layout): layout for layout in self.layouts}.values():
            # Whoever holds it is from now on of another class than who doesn't, and than who holds another region.
            ranks = np.asarray(layout.mesh.ranks)
            both = np.stack([labels[ranks], layout.slice_ids()])
            _, refined = np.unique(both, axis=1, return_inverse=True)
            labels[ranks] = free + refined.reshape(-1)
            free += len(ranks)
        order = np.argsort(labels, kind="stable")
        bounds = np.flatnonzero(np.diff(labels[order])) + 1
        return tuple(sorted(tuple(part.tolist()) for part in np.split(order, bounds)))


def lay_out(strategy: Strategy, tensors: Iterable[GlobalTensor]) -> Placement:
    """Lay tensors out under a strategy, by their names.

    A layer lies on the pipeline stage that its number gives it (`stage_layers`), an expert on the ranks of its share of the experts. What
    surrounds the layers is on the first stage, or on the last where its name says so; an embedding without an output layer in the model is
    tied and on both. A slot lies as its parameter where it has the same shape, else whole on the parameter's ranks; what belongs to no
    parameter is on every rank.

    Raises:
        UsageError: a rule means a dimension that a tensor doesn't have.
    """
    tensors = tuple(tensors)
    names = {parameter: understand(parameter) for parameter in dict.fromkeys(tensor.key.parameter for tensor in tensors) if parameter}
    shapes = {tensor.key.parameter: tensor.global_shape for tensor in tensors if tensor.key.kind is Kind.MODEL}
    maker = _Layouts(strategy, names)
    return Placement(strategy, tensors, tuple(maker.layout(tensor, shapes.get(tensor.key.parameter)) for tensor in tensors))


def describe_rank(strategy: Strategy, tensors: Iterable[GlobalTensor], rank: int) -> RankDescription:
    """What one rank of a strategy holds; for many ranks `lay_out` once and ask it.

    Raises:
        UsageError: as in `lay_out`, or the strategy has no such rank.
    """
    return lay_out(strategy, tensors).describe(rank)


def rank_classes(strategy: Strategy, tensors: Iterable[GlobalTensor]) -> tuple[tuple[int, ...], ...]:
    """The ranks of a strategy in classes that hold the same regions of the same tensors; ascending, by their first ranks.

    Raises:
        UsageError: as in `lay_out`.
    """
    return lay_out(strategy, tensors).classes


class _Layouts:
    """The layouts of one strategy and one model, each made once."""

    def __init__(self, strategy: Strategy, names: dict[str, ParameterName]) -> None:
        self._strategy = strategy
        self._names = names
        layers: dict[str, set[int]] = {}
        for name in names.values():
            if name.layer is not None:
                layers.setdefault(name.stack, set()).add(name.layer)
        # A small stack beside the model's own layers (next-token modules, a vision tower) isn't spread over stages.
        most = max(map(len, layers.values()), default=0)
        self._stacks = {stack: max(numbers) + 1 for stack, numbers in layers.items() if len(numbers) == most}
        self._experts = 1 + max((name.expert for name in names.values() if name.expert is not None), default=0)
        self._is_tied = not any(name.is_output for name in names.values())
        self._meshes: dict[tuple[object, ...], Mesh] = {}
        self._layouts: dict[tuple[object, ...], Layout] = {}
        self._ways: dict[tuple[str, int], tuple[Layout, Layout, Layout]] = {}
        self._known: dict[tuple[int | None, ...], tuple[Layout, Layout, Layout]] = {}

    def layout(self, tensor: GlobalTensor, parameter_shape: tuple[int, ...] | None) -> Layout:
        """The layout of a tensor.

        Args:
            tensor: the tensor.
            parameter_shape: the shape of its parameter, None when that isn't known.
        """
        kind, _, parameter = tensor.key
        shape = tensor.global_shape
        if not parameter:
            return self._made(self._mesh(tuple(range(self._strategy.pp))), ((),) * len(shape))
        ways = self._ways.get((parameter, len(shape)))
        if ways is None:
            ways = self._ways[parameter, len(shape)] = self._ways_of(parameter, len(shape))
        if parameter_shape is not None and parameter_shape != shape:
            return ways[2]
        return ways[kind is Kind.OPTIMIZER]

    def _ways_of(self, parameter: str, dimensions: int) -> tuple[Layout, Layout, Layout]:
        """How a parameter lies, how an optimizer tensor of its shape, and how one of another shape."""
        mesh, found = self._way(parameter, dimensions)
        key = (id(mesh), dimensions, *found.values())
        ways = self._known.get(key)
        if ways is None:

            def made(*axes: str) -> Layout:
                kept = [(mesh.axes.index(axis), found[axis]) for axis in axes if axis in mesh.axes]
                return self._made(mesh, tuple(tuple(axis for axis, at in kept if at == d) for d in range(dimensions)))

            # Outermost first, as FSDP2 does it: it shards what tensor parallelism has left.
            ways = self._known[key] = made("ep", "tp", "fsdp"), made("ep", "tp", "fsdp", "dp"), made()
        return ways

    def _way(self, parameter: str, dimensions: int) -> tuple[Mesh, dict[str, int | None]]:
        """On which mesh a parameter lies, and which dimension each axis splits."""
        name, strategy = self._names[parameter], self._strategy
        rule = strategy.rule(parameter)
        first = 0 if dimensions else None
        found: dict[str, int | None] = {"ep": None, "tp": None, "fsdp": first, "dp": first if strategy.shard_optimizer else None}
        if rule is None:
            found["tp"] = name.tensor_dimension(dimensions)
            found["ep"] = first if name.is_of_experts and name.expert is None else None
        else:
            found |= {axis: self._dimension(given, dimensions, rule.text, parameter) for axis, given in rule.dimensions.items()}
            if not strategy.shard_optimizer:
                found["dp"] = None
        stages = self._stages(name)
        if strategy.ep > 1 and (name.expert is not None or found["ep"] is not None):
            share = None if name.expert is None else name.expert // -(-self._experts // strategy.ep)
            mesh = self._expert_mesh(stages, share)
        else:
            mesh = self._mesh(stages)
        return mesh, found

    def _dimension(self, given: int | None, dimensions: int, rule: str, parameter: str) -> int | None:
        # A scalar (a step count) follows its parameter's rule as far as it can: it has nothing to split.
        if given is None or dimensions == 0:
            return None
        if not -dimensions <= given < dimensions:
            raise UsageError(
                "a rule splits a dimension that a tensor doesn't have",
                tensor=parameter,
                field="split",
                found=rule,
                expected=f"a dimension from {-dimensions} to {dimensions - 1}",
            )
        return given % dimensions

    def _stages(self, name: ParameterName) -> tuple[int, ...]:
        stages = self._strategy.pp
        if name.layer is not None and name.stack in self._stacks:
            return (stage_of_layer(name.layer, self._stacks[name.stack], stages),)
        if name.is_embedding and self._is_tied and stages > 1:
            return (0, stages - 1)
        return (stages - 1 if name.is_after else 0,)

    def _mesh(self, stages: tuple[int, ...]) -> Mesh:
        strategy = self._strategy
        return self._made_mesh(("dp", "fsdp", "tp"), (strategy.dp, strategy.fsdp, strategy.tp), stages, None)

    def _expert_mesh(self, stages: tuple[int, ...], share: int | None) -> Mesh:
        return self._made_mesh(("dp", "fsdp", "ep", "tp"), (*self._strategy.expert_sizes, self._strategy.tp), stages, share)

    def _made_mesh(self, axes: tuple[str, ...], sizes: tuple[int, ...], stages: tuple[int, ...], share: int | None) -> Mesh:
        """A mesh of some stages; with a share the ranks that have this share of numbered experts. Axes of size 1 are left out."""
        key = (axes, stages, share)
        mesh = self._meshes.get(key)
        if mesh is None:
            ranks = np.arange(self._strategy.world_size).reshape(self._strategy.pp, *sizes)[list(stages)]
            kept = ["pp", *axes]
            if share is not None:
                ranks = ranks[:, :, :, share]
                kept.remove("ep")
            named = [(axis, size) for axis, size in zip(kept, ranks.shape, strict=True) if size > 1] or [("dp", 1)]
            mesh = self._meshes[key] = Mesh(
                tuple(size for _, size in named), tuple(axis for axis, _ in named), tuple(ranks.reshape(-1).tolist())
            )
        return mesh

    def _made(self, mesh: Mesh, split: tuple[tuple[int, ...], ...]) -> Layout:
        key = (id(mesh), split)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = Layout(mesh, split)
        return layout
