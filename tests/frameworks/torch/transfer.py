"""A checkpoint without files: what one run's state holds goes into another run's memory by key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reshard.catalog import Catalog
from reshard.frameworks.torch import TorchAdapter
from reshard.geometry import Region
from reshard.state import ParameterGroup, ShardedTensor, State, TensorKey
from tests.catalogs import stored_tensor


def catalog_of(state: State) -> Catalog:
    """The catalog of a checkpoint that holds this state."""
    return Catalog("", {t.key: stored_tensor(t.key, t.dtype, t.global_shape, t.layout, ()) for t in state.tensors.values()})


def frozen(state: State) -> dict[TensorKey, list[tuple[Region, np.ndarray]]]:
    """Copies of everything that a state holds."""
    return {key: [(shard.region, shard.memory.read().copy()) for shard in tensor.shards] for key, tensor in state.tensors.items()}


def fill(target: ShardedTensor, stored: list[tuple[Region, np.ndarray]]) -> None:
    """Fill a tensor with stored regions, which must cover what it holds."""
    for shard in target.shards:
        filled = 0
        for region, values in stored:
            common = shard.region.intersect(region)
            if common is not None:
                assert values.dtype == target.dtype.numpy
                shard.memory.write(common.relative_to(shard.region), values[common.relative_to(region).slices])
                filled += common.size
        assert filled == shard.region.size


def resume(state: State, copies: dict[TensorKey, list[tuple[Region, np.ndarray]]], model, optimizer) -> set[TensorKey]:
    """Load a state, saved as copies, into another run. Returns the keys that the run wanted and the checkpoint lacks."""
    return load(catalog_of(state), state.groups, copies, model, optimizer)


def load(catalog: Catalog, groups: Sequence[ParameterGroup], copies, model, optimizer) -> set[TensorKey]:
    destination = TorchAdapter().prepare(model, optimizer).destination(catalog, groups)
    missing = set()
    for key, tensor in destination.state.tensors.items():
        if key not in copies:
            missing.add(key)
            continue
        stored = catalog.tensors[key]
        assert (stored.dtype, stored.global_shape) == (tensor.dtype, tensor.global_shape), key
        fill(tensor, copies[key])
    destination.install(groups)
    return missing
