"""Loads of tensors that are quantised by block: of each scale a rank reads the numbers of its own elements, before these elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from reshard.catalog import Catalog
from reshard.format.safetensors import TensorEntry
from reshard.geometry import Region
from reshard.geometry.dtypes import by_name
from reshard.loading.casting import CastMemory, ScaledMemory
from reshard.loading.reader import locate
from reshard.planning.agreement import RankDescription, describe
from reshard.planning.block_scales import BlockScale, block_in, may_be_quantised, plain_face, quantised_in, scale_of, united
from reshard.planning.mapping.lattice import Face, Lattice, moved
from reshard.planning.mapping.wanted import Told
from reshard.planning.read_plan import Mismatch, ReadPlan, plan_reads
from reshard.sources.stored import Headers
from reshard.state import HostMemory, Shard, ShardedTensor, State, TensorKey


@dataclass(frozen=True)
class _Scaled:
    """How a shard's elements are scaled.

    Attributes:
        scale: of the stored tensor.
        face: where the elements lie in that.
        part: which part of the scale they need, or more.
        numbers: memory for it.
    """

    scale: BlockScale
    face: Face
    part: Region
    numbers: np.ndarray


@dataclass(frozen=True)
class PlannedScales:
    """What one rank needs of the scales of a checkpoint. Every rank has such a plan, or none has.

    Attributes:
        state: memory for it.
        wanted: the description of that.
        catalog: the scales.
        plan: what is read of them.
        entries: where that lies; of a direct load only.
        scaled: by tensor and shard, how what is read into them is scaled; None for a shard without elements.
    """

    state: State
    wanted: RankDescription
    catalog: Catalog
    plan: ReadPlan
    entries: list[list[TensorEntry]]
    scaled: Mapping[TensorKey, tuple[_Scaled | None, ...]]

    @property
    def keys(self) -> frozenset[TensorKey]:
        """The scales, by their keys in the checkpoint."""
        return frozenset(self.state.tensors)

    def scaling(self, tensor: ShardedTensor) -> ShardedTensor:
        """A tensor with memory that dequantises what is written into it."""
        shards = [
            shard
            if own is None
            else shard._replace(memory=ScaledMemory(shard.memory, tensor.dtype, own.scale, own.numbers, own.part, own.face))
            for shard, own in zip(tensor.shards, self.scaled[tensor.key], strict=True)
        ]
        return tensor._replace(shards=tuple(shards))


def plan_scales(
    state: State,
    stored: Catalog,
    chosen: Catalog,
    told: Told | None,
    *,
    config: Mapping[str, Any] | None,
    casts: Callable[[Mismatch], bool],
    rank: int,
    headers: Headers | None,
) -> PlannedScales | None:
    """Plan what one rank needs of scales. None when nothing that the load is about is quantised by block: the same on every rank.

    A tensor that the run itself holds in the stored type stays as it is.

    Args:
        state: what this rank fills, in strands where the load goes through a mapping.
        stored: what the checkpoint holds.
        chosen: the part of it that the load is about, in strands likewise.
        told: the catalog in strands, where there is a mapping.
        config: the model's description, which says the blocks; None when there is none.
        casts: whether a tensor of another type is converted.
        rank: this rank.
        headers: of the files, of a direct load; None of a balanced one.

    Raises:
        UsageError: nobody knows the blocks.
        MismatchError: a scale that doesn't fit its tensor.
        DamagedCheckpointError: a scale isn't what the checkpoint promises.
    """
    if not may_be_quantised(stored):
        return None
    origins = {key: key if told is None else told.stored[key] for key in chosen.tensors}
    quantised = quantised_in(stored, dict.fromkeys(origins.values()))
    if not quantised:
        return None
    block = block_in(config)
    lattices = {} if told is None else {strand.key: strand.lattice for one in told.links.tensors.values() for strand in one.strands}
    scales: dict[TensorKey, BlockScale] = {}
    faces: dict[TensorKey, list[Face | None]] = {}
    regions: dict[TensorKey, list[Region]] = {}
    for key, tensor in state.tensors.items():
        origin = origins.get(key)
        if origin is None or origin not in quantised:
            continue
        there = chosen.tensors[key]
        misfit = Mismatch(key, "dtype", there.dtype.name, tensor.dtype.name)
        if there.dtype == tensor.dtype or there.global_shape != tensor.global_shape or not casts(misfit):
            continue
        scale = scales.get(origin) or scales.setdefault(origin, scale_of(stored, origin, quantised[origin], block))
        faces[key] = [_face(lattices.get(key), stored.tensors[origin].global_shape, shard.region) for shard in tensor.shards]
        own = [scale.region(face, shard.region.shape) for face, shard in zip(faces[key], tensor.shards, strict=True) if face is not None]
        regions.setdefault(scale.key, []).extend(own)
    parts = {
        key: [(region, np.empty(region.shape, stored.tensors[key].dtype.numpy)) for region in united(own)] for key, own in regions.items()
    }
    scaled = {
        key: tuple(
            None if face is None else _scaled(scales[origins[key]], face, shard.region, parts)
            for face, shard in zip(own, state.tensors[key].shards, strict=True)
        )
        for key, own in faces.items()
    }
    held = {
        key: ShardedTensor(
            key,
            stored.tensors[key].dtype,
            stored.tensors[key].global_shape,
            None,
            tuple(Shard(region, HostMemory(numbers)) for region, numbers in own),
        )
        for key, own in parts.items()
    }
    numbers = State(held)
    wanted = describe(numbers, rank)
    catalog = replace(stored, tensors={key: stored.tensors[key] for key in dict.fromkeys(quantised.values())})
    plan = plan_reads(wanted, catalog)
    return PlannedScales(numbers, wanted, catalog, plan, [] if headers is None else locate(plan, headers), scaled)


def converting(state: State, casts: Sequence[Mismatch], scales: PlannedScales | None) -> State:
    """The state with memory that converts what is written into it, where a tensor is to be cast or dequantised."""
    if not casts:
        return state
    tensors = dict(state.tensors)
    for misfit in casts:
        tensor = tensors[misfit.key]
        if scales is not None and misfit.key in scales.scaled:
            tensors[misfit.key] = scales.scaling(tensor)
            continue
        stored = by_name(misfit.stored)
        shards = tuple(shard._replace(memory=CastMemory(shard.memory, stored, tensor.dtype)) for shard in tensor.shards)
        tensors[misfit.key] = tensor._replace(shards=shards)
    return replace(state, tensors=tensors)


def _face(lattice: Lattice | None, shape: tuple[int, ...], region: Region) -> Face | None:
    """Where the elements of a shard lie in the stored tensor; None when it has none."""
    if region.is_empty:
        return None
    if lattice is None or lattice.is_identity:
        return plain_face(shape, region)
    return moved(lattice.right, region.offset)


def _scaled(scale: BlockScale, face: Face, region: Region, parts: Mapping[TensorKey, Sequence[tuple[Region, np.ndarray]]]) -> _Scaled:
    needed = scale.region(face, region.shape)
    part, numbers = next((part, numbers) for part, numbers in parts[scale.key] if part.contains(needed))
    return _Scaled(scale, face, part, numbers)
