"""Tensors of a rank as shards: which regions of the global tensor the local memory holds, and how the whole lies on its mesh."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reshard.errors import CaptureError
from reshard.frameworks.torch.memory import MirrorMemory, checked_dtype, dtype_and_memory, memory_of
from reshard.frameworks.torch.placements import (
    dtensor_type,
    dtensors_of,
    explicit_order,
    fsdp2_runs_of,
    is_dtensor,
    runs_of,
    split_order,
    splits_of,
)
from reshard.geometry import Layout, Mesh, Region
from reshard.state import Memory, Shard, ShardedTensor, TensorKey

# Named tuples are made by what their own functions call in the end, in half the time: states have 100,000 tensors.
_new = tuple.__new__


@dataclass(frozen=True)
class _Piece:
    """A region of the global tensor, and where it lies in the local one."""

    region: Region
    local: Region


@dataclass(frozen=True)
class _Holding:
    """What this rank holds of a tensor: the layout of the whole (None when no layout can say it) and the rank's pieces."""

    layout: Layout | None
    pieces: tuple[_Piece, ...]
    region: Region | None = None
    """What all of the local tensor is, where that is one region, as nearly always."""


class Meshes:
    """The meshes of a model on this rank, and how tensors lie on them.

    The *home* of a mesh is the largest of the model's meshes of which it is a slice. A tensor on a slice (FSDP2 shards what tensor
    parallelism leaves alone over the data-parallel axis only) is given the layout on the whole home, replicated over the other axes, and a
    plain tensor is replicated over the largest of all: every rank of it runs the same modules. The same ranks may have more than one
    home: experts see them with other axes. A plain tensor of a model without DTensors, or with meshes that don't lie inside one, has no
    layout; then what each rank holds is all that is known.

    `_StridedShard` is filled in two ways where it doesn't divide evenly, or lies over one that interleaves: FSDP2 cuts what tensor
    parallelism has left, one after the other, as a layout does; `distribute_tensor` follows the placements from the first to the last,
    which no layout says. So it matters whose tensor it is. Optimizer slots are filled as the parameter of their shape and placements is.

    Args:
        tensors: the model's.
        fsdp2: the identities of those that FSDP2 manages.
        before: of an earlier capture. What it found out is used again where the tensors lie on the same meshes. It keeps no tensor alive.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], fsdp2: Collection[int] = (), before: Meshes | None = None) -> None:
        self._dtensor = dtensor_type()
        # Meshes, and the specifications of what FSDP2 manages, are kept, so that no other object gets their identity.
        self._devices: dict[int, Any] = {}
        self._by_fsdp2: dict[int, Any] = {}
        for tensor in dtensors_of(tensors):
            spec = tensor._spec
            mesh = spec.mesh
            self._devices[id(mesh)] = mesh
            if fsdp2 and id(tensor) in fsdp2:
                self._by_fsdp2[id(spec)] = spec
        self._specs: dict[int, tuple[Any, torch.Size, tuple[tuple[int, ...], _Holding]]] = {}
        self._specs_before = self._specs
        if before is not None and before._devices.keys() == self._devices.keys() and before._by_fsdp2.keys() == self._by_fsdp2.keys():
            self._specs_before = before._specs
            self._meshes, self._holdings, self._layouts = before._meshes, before._holdings, before._layouts
            self._kinds_by_fsdp2, self._others, self._plain = before._kinds_by_fsdp2, before._others, before._plain
            self._largest_first, self._everywhere = before._largest_first, before._everywhere
            return
        self._meshes: dict[int, Mesh] = {}
        self._holdings: dict[Any, tuple[tuple[int, ...], _Holding]] = {}
        self._layouts: dict[tuple[int, tuple[tuple[int, ...], ...]], Layout] = {}
        self._others: dict[int, Any] = {}  # also meshes that only an optimizer's tensors lie on
        self._plain: dict[torch.Size, tuple[tuple[int, ...], _Holding]] = {}
        self._kinds_by_fsdp2 = {_kind_of(spec) for spec in self._by_fsdp2.values()}
        for device_mesh in self._devices.values():
            self._mesh(device_mesh)
        meshes = dict.fromkeys(self._meshes.values())
        self._largest_first = sorted(meshes, key=lambda mesh: (len(mesh.ranks), len(mesh.shape)), reverse=True)
        home = self._largest_first[0] if meshes else None
        self._everywhere = home if all(home and set(mesh.ranks) <= set(home.ranks) for mesh in meshes) else None

    def replicated(self, dimensions: int) -> Layout | None:
        """The layout of a tensor that every rank of the model holds whole."""
        return None if self._everywhere is None else self._one_layout(self._everywhere, ((),) * dimensions)

    def sharded(self, key: TensorKey, tensor: torch.Tensor, name: str, like: torch.Tensor | None = None) -> ShardedTensor:
        """A tensor as this rank holds it.

        Args:
            key: what it is.
            tensor: a DTensor or a plain tensor.
            name: what to call it in errors.
            like: a DTensor of the same global tensor shape; a plain tensor that has the shape of its local part lies as it does.

        Raises:
            CaptureError: a `Partial` or unknown placement; a local tensor that doesn't hold what its placements say; memory that can't be
                reached; a plain tensor beside a DTensor, of a shape that fits neither its part nor its whole.
        """
        if isinstance(tensor, self._dtensor):
            local = _local(tensor)
            whole, holding = self._holding(tensor, local, name)
        elif like is None or not is_dtensor(like) or tensor.ndim == 0:
            local = tensor
            whole, holding = self._whole(tensor)
        elif tensor.shape == _local(like).shape:
            local = tensor
            whole, holding = self._holding(like, tensor, name)
        else:
            raise CaptureError(
                "a plain tensor beside a DTensor parameter: how the whole lies on the ranks can't be known",
                tensor=name,
                found=f"shape {tuple(tensor.shape)}",
                expected=f"a DTensor, or the shape of the parameter's local part {tuple(_local(like).shape)}",
            )
        region = holding.region
        if region is not None:
            dtype, memory = dtype_and_memory(local, name)
            shards = (_new(Shard, (region, memory)),)
        else:
            dtype = checked_dtype(local, name)
            shards = tuple(Shard(piece.region, _memory(local, piece.local, name)) for piece in holding.pieces)
        return _new(ShardedTensor, (key, dtype, whole, holding.layout, shards))

    def _whole(self, tensor: torch.Tensor) -> tuple[tuple[int, ...], _Holding]:
        """How a plain tensor lies that every rank of the model holds whole."""
        found = self._plain.get(tensor.shape)
        if found is None:
            shape = tuple(tensor.shape)
            region = Region.whole(shape)
            found = self._plain[tensor.shape] = shape, _Holding(self.replicated(len(shape)), (_Piece(region, region),), region)
        return found

    def _mesh(self, device_mesh: Any) -> Mesh:
        # By identity (the tensors keep it alive): its hash goes over its ranks, and what it gives as `mesh` is made anew each time.
        mesh = self._meshes.get(id(device_mesh))
        if mesh is None:
            ranks = device_mesh.mesh
            shape = tuple(ranks.shape)
            axes = tuple(device_mesh.mesh_dim_names or (f"axis{index}" for index in range(len(shape))))
            mesh = Mesh(shape, axes, tuple(ranks.flatten().tolist()))
            mesh = self._meshes[id(device_mesh)] = next((other for other in self._meshes.values() if other == mesh), mesh)
        return mesh

    def _holding(self, tensor: Any, local: torch.Tensor, name: str) -> tuple[tuple[int, ...], _Holding]:
        """The global shape of a DTensor and how it lies, for a local part; computed once for all with the same shapes and placements."""
        # The specification, since asking the tensor itself goes through torch's dispatcher; it is also the only place where a release
        # keeps an order apart from the placements. The mesh by identity (it is kept alive): its hash goes over its ranks.
        spec, extent = tensor._spec, local.shape
        known = self._specs_before.get(id(spec))
        if known is None or known[0] is not spec or known[1] != extent:
            alike = (id(spec.mesh), spec.placements, spec.tensor_meta.shape, getattr(spec, "shard_order", None), extent)
            found = self._holdings.get(alike)
            if found is None:
                shape = tuple(tensor.shape)
                self._others[id(spec.mesh)] = spec.mesh
                found = self._holdings[alike] = (shape, self._find(tensor, spec, shape, tuple(extent), name))
            known = spec, extent, found
        self._specs[id(spec)] = known
        return known[2]

    def _find(self, tensor: Any, spec: Any, shape: tuple[int, ...], local: tuple[int, ...], name: str) -> _Holding:
        mesh = self._mesh(tensor.device_mesh)
        splits = splits_of(tensor.placements, len(shape), name)
        rank = _rank()
        orders = _orders(splits, spec, mesh, len(shape))
        by_fsdp2 = bool(self._kinds_by_fsdp2) and _kind_of(spec) in self._kinds_by_fsdp2
        if orders is not None and not by_fsdp2 and not _agree(splits, Layout(mesh, orders), shape):
            orders = None
        layout = None if orders is None else self._layout(mesh, orders, rank)
        if rank not in mesh:
            return _Holding(layout, ())
        if layout is not None:
            region = layout.rank_region(rank, shape)
            runs = [[(begin, count)] for begin, count in zip(region.offset, region.shape, strict=True)]
        else:
            coordinate = mesh.coordinate(mesh.position(rank))
            held = fsdp2_runs_of if by_fsdp2 else runs_of
            runs = [held(splits, mesh.shape, coordinate, dimension, size) for dimension, size in enumerate(shape)]
        extent = tuple(sum(count for _, count in dimension) for dimension in runs)
        if tuple(local) == extent or (0 in local and 0 in extent):  # an empty part may have any empty shape
            pieces = _pieces(runs, shape)
            is_one = len(pieces) == 1 and pieces[0].local == Region.whole(tuple(local)) and 0 not in local
            return _Holding(layout, pieces, pieces[0].region if is_one else None)
        raise CaptureError(
            "the local part of a DTensor doesn't have the shape that its placements give this rank",
            tensor=name,
            rank=rank,
            found=f"local shape {local}",
            expected=f"{extent} of {shape}, placements {tuple(tensor.placements)} on mesh {mesh.shape}",
            fix="give DTensor.from_local the global shape and stride of an uneven split",
        )

    def _layout(self, mesh: Mesh, orders: Sequence[tuple[int, ...]], rank: int) -> Layout:
        """The layout of these orders of axes, on the mesh's home."""
        for home in self._largest_first:
            if home == mesh:
                break
            if set(mesh.axes) <= set(home.axes) and rank in home and rank in mesh:
                axes = [home.axes.index(name) for name in mesh.axes]
                if _slice(home, axes, rank) == mesh.ranks:
                    return self._one_layout(home, tuple(tuple(axes[axis] for axis in order) for order in orders))
        return self._one_layout(mesh, tuple(orders))

    def _one_layout(self, mesh: Mesh, split: tuple[tuple[int, ...], ...]) -> Layout:
        """The same object for the same layout: to compare two by their values means to go over all ranks of a mesh."""
        layout = self._layouts.get((id(mesh), split))
        if layout is None:
            layout = self._layouts[id(mesh), split] = Layout(mesh, split)
        return layout


def mirrored(tensors: Sequence[ShardedTensor], name: str) -> ShardedTensor:
    """Several tensors of one rank that are the same global tensor, as one that fills them all.

    Raises:
        CaptureError: they differ in dtype, shape or regions.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    for other in tensors[1:]:
        mine, theirs = ((t.dtype.name, t.global_shape, tuple(shard.region for shard in t.shards)) for t in (first, other))
        if mine != theirs:
            raise CaptureError("tied tensors differ in dtype, shape or layout", tensor=name, found=theirs, expected=mine)
    shards = tuple(
        Shard(shards[0].region, MirrorMemory([shard.memory for shard in shards]))
        for shards in zip(*(tensor.shards for tensor in tensors), strict=True)
    )
    return ShardedTensor(first.key, first.dtype, first.global_shape, first.layout, shards)


def _rank() -> int:
    return torch.distributed.get_rank()


def _local(tensor: Any) -> torch.Tensor:
    """The local part of a DTensor itself, without a view of it for autograd."""
    # What `to_local` begins with. It has no public name, and `to_local` takes 10 µs for the rest: states have 100,000 tensors.
    local = tensor._local_tensor
    if type(local) is torch.Tensor:
        return local
    with torch.no_grad():
        return tensor.to_local()


def _kind_of(spec: Any) -> tuple[Any, ...]:
    """What the specifications of DTensors that lie alike have in common."""
    return spec.mesh, tuple(spec.placements), tuple(spec.tensor_meta.shape)


def _orders(splits: Sequence[tuple[int, int] | None], spec: Any, mesh: Mesh, dimensions: int) -> tuple[tuple[int, ...], ...] | None:
    explicit = explicit_order(spec, dimensions)
    if explicit is not None and all(split is None or split[1] == 1 for split in splits):
        return explicit
    orders = tuple(split_order(splits, mesh.shape, dimension) for dimension in range(dimensions))
    return None if any(order is None for order in orders) else tuple(order for order in orders if order is not None)


def _slice(home: Mesh, axes: Sequence[int], rank: int) -> tuple[int, ...]:
    """The ranks of the slice of a mesh along these axes, in their order, that goes through a rank."""
    here = home.coordinate(home.position(rank))
    ranks = []
    for place in itertools.product(*(range(home.shape[axis]) for axis in axes)):
        position = 0
        for axis, size in enumerate(home.shape):
            position = position * size + (place[axes.index(axis)] if axis in axes else here[axis])
        ranks.append(home.ranks[position])
    return tuple(ranks)


def _agree(splits: Sequence[tuple[int, int] | None], layout: Layout, shape: tuple[int, ...]) -> bool:
    """Whether placements that are read from the first to the last give every place of the mesh what a layout gives it."""
    if all(split is None or split[1] == 1 for split in splits) or layout.is_even(shape):
        return True
    mesh = layout.mesh
    for position in range(len(mesh.ranks)):
        coordinate, region = mesh.coordinate(position), layout.region(position, shape)
        for dimension, size in enumerate(shape):
            count = region.shape[dimension]
            mine = [(region.offset[dimension], count)] if count else []
            if runs_of(splits, mesh.shape, coordinate, dimension, size) != mine:
                return False
    return True


def _pieces(runs: Sequence[Sequence[tuple[int, int]]], shape: tuple[int, ...]) -> tuple[_Piece, ...]:
    """The boxes that runs in every dimension make. A part of nothing is no piece; of an empty tensor it is one, or nobody had it."""
    if 0 in shape:
        extent = tuple(sum(count for _, count in dimension) for dimension in runs)
        return (_Piece(Region(tuple(dimension[0][0] if dimension else 0 for dimension in runs), extent), Region.whole(extent)),)
    pieces = []
    placed = [_placed(dimension) for dimension in runs]
    for box in itertools.product(*placed):
        region = Region(tuple(start for start, _, _ in box), tuple(count for _, count, _ in box))
        local = Region(tuple(at for _, _, at in box), region.shape)
        if not region.is_empty:
            pieces.append(_Piece(region, local))
    return tuple(pieces)


def _placed(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Runs with the place of each in the local tensor."""
    result, at = [], 0
    for start, count in runs:
        result.append((start, count, at))
        at += count
    return result


def _memory(local: torch.Tensor, where: Region, name: str) -> Memory:
    if where.is_empty:
        return memory_of(local.detach().reshape(where.shape), name)
    if where.shape == tuple(local.shape):
        return memory_of(local, name)
    for dimension, (begin, length) in enumerate(zip(where.offset, where.shape, strict=True)):
        local = local.detach().narrow(dimension, begin, length)
    return memory_of(local, name)
