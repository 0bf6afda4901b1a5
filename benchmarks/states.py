"""The states that are measured: names and shapes, how they lie on four ranks, and values that tell one element from any other."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from reshard.geometry import Layout, Mesh, Region

WORLD_SIZE = 4
ITEM_BYTES = 4

# 0.998 GB of float32: 18 layers of 12 · 1024² weights, and an embedding.
HIDDEN, LAYERS, VOCABULARY = 1024, 18, 22 * 1024

# 4 KB in all, of which each rank holds 1 KB.
SMALL_SHAPE = (32, 32)

# Values are made and compared in pieces that stay in a core's cache.
_BLOCK_ITEMS = 1 << 16


@dataclass(frozen=True)
class TensorSpec:
    """A global float32 tensor.

    Attributes:
        name: as the module names it.
        shape: its global shape.
        split: the dimension that tensor parallelism splits; None where every rank holds all of it.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None


@dataclass(frozen=True)
class Strategy:
    """How tensors lie on the ranks.

    Attributes:
        title: for people.
        mesh: the size of each axis.
        axes: the name of each axis.
        transposed: whether tensor parallelism splits the other dimension of each matrix.
    """

    title: str
    mesh: tuple[int, ...]
    axes: tuple[str, ...]
    transposed: bool = False

    def split(self, tensor: TensorSpec) -> tuple[int | None, ...]:
        """For each axis of the mesh the dimension that it splits, None where it repeats."""
        if "tp" not in self.axes:
            return (0,)
        dimension = tensor.split
        if dimension is not None and self.transposed:
            dimension = 1 - dimension
        return (None, dimension)

    def region(self, tensor: TensorSpec, rank: int) -> Region:
        """What a rank holds of a tensor."""
        split: list[tuple[int, ...]] = [()] * len(tensor.shape)
        for axis, dimension in enumerate(self.split(tensor)):
            if dimension is not None:
                split[dimension] = (axis,)
        layout = Layout(Mesh(self.mesh, self.axes, tuple(range(WORLD_SIZE))), tuple(split))
        if not layout.is_even(tensor.shape):
            raise ValueError(f"{tensor.name}: {tensor.shape} doesn't divide evenly into {layout.fragments}")
        return layout.rank_region(rank, tensor.shape)


TENSOR_PARALLEL = Strategy("dp2 × tp2", (2, 2), ("dp", "tp"))
TRANSPOSED = Strategy("dp2 × tp2, rows and columns exchanged", (2, 2), ("dp", "tp"), transposed=True)
FSDP = Strategy("FSDP over 4", (4,), ("dp",))


def transformer(scale: float = 1.0) -> tuple[TensorSpec, ...]:
    """The weights of a transformer. A smaller scale takes layers and vocabulary away; below one layer, width too.

    Args:
        scale: the size, as a part of 1.0 GB.
    """
    width = min(1.0, scale * LAYERS) ** 0.5
    hidden = max(64, round(HIDDEN * width / 64) * 64)
    layers = max(1, round(LAYERS * scale))
    vocabulary = max(64, round(VOCABULARY * scale / 64) * 64)
    tensors = [TensorSpec("model.embed_tokens.weight", (vocabulary, hidden), 0)]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors.append(TensorSpec(f"{prefix}.input_layernorm.weight", (hidden,)))
        tensors += [TensorSpec(f"{prefix}.self_attn.{part}_proj.weight", (hidden, hidden), 0) for part in "qkv"]
        tensors.append(TensorSpec(f"{prefix}.self_attn.o_proj.weight", (hidden, hidden), 1))
        tensors.append(TensorSpec(f"{prefix}.post_attention_layernorm.weight", (hidden,)))
        tensors.append(TensorSpec(f"{prefix}.mlp.up_proj.weight", (4 * hidden, hidden), 0))
        tensors.append(TensorSpec(f"{prefix}.mlp.down_proj.weight", (hidden, 4 * hidden), 1))
    return (*tensors, TensorSpec("model.norm.weight", (hidden,)))


def small_tensors(number: int) -> tuple[TensorSpec, ...]:
    """So many tensors of 4 KB each, 100 to a module."""
    return tuple(TensorSpec(f"blocks.{i // 100}.weight_{i % 100}", SMALL_SHAPE) for i in range(number))


def unique_bytes(tensors: Sequence[TensorSpec]) -> int:
    """The bytes of all tensors, each counted once."""
    return sum(math.prod(tensor.shape) for tensor in tensors) * ITEM_BYTES


def moved_bytes(tensors: Sequence[TensorSpec], strategy: Strategy) -> int:
    """The bytes that all ranks hold together."""
    return ITEM_BYTES * sum(math.prod(strategy.region(tensor, rank).shape) for tensor in tensors for rank in range(WORLD_SIZE))


def values(tensor: TensorSpec, region: Region) -> Iterator[tuple[slice, np.ndarray]]:
    """The bits of a region of a tensor, some rows at a time: all 2^32 bit patterns may occur, -0.0 and NaNs with a payload among them.

    Yields:
        Which rows of the region (elements, where it has one dimension), and their values: uint32, two-dimensional.
    """
    # A tensor of one dimension has one column.
    count, columns = (*region.shape, 1)[:2]
    first_row, first_column = (*region.offset, 0)[:2]
    width = np.uint32((*tensor.shape, 1)[1])
    seed = np.uint32(zlib.crc32(tensor.name.encode()))
    step = max(1, _BLOCK_ITEMS // columns)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        rows = np.arange(first_row + begin, first_row + end, dtype=np.uint32)
        bits = rows[:, None] * width + np.arange(first_column, first_column + columns, dtype=np.uint32)
        # A mixer of 32 bits (multiply, shift, exclusive or): neighbours differ in every bit, and no two elements of a tensor are equal.
        bits ^= seed
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits ^= bits >> np.uint32(shift)
            bits *= np.uint32(factor)
        bits ^= bits >> np.uint32(16)
        yield slice(begin, end), bits


def digests(tensors: Sequence[TensorSpec], strategy: Strategy, rank: int) -> list[bytes]:
    """What a rank's shards must hash to after a load, tensor by tensor."""
    found = []
    for tensor in tensors:
        hashed = xxhash.xxh3_128()
        for _, bits in values(tensor, strategy.region(tensor, rank)):
            hashed.update(np.ascontiguousarray(bits).data)
        found.append(hashed.digest())
    return found


def build(tensors: Sequence[TensorSpec], strategy: Strategy) -> tuple[Any, list[np.ndarray]]:
    """A module of this rank, its parameters DTensors. Collective.

    Returns:
        The module, and what this rank holds of each tensor: the parameters' own memory, as uint32, not yet touched.
    """
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", strategy.mesh, mesh_dim_names=strategy.axes)
    rank = dist.get_rank()
    root = nn.Module()
    memory = []
    for tensor in tensors:
        local = torch.empty(strategy.region(tensor, rank).shape, dtype=torch.float32)
        placements = [Replicate() if dimension is None else Shard(dimension) for dimension in strategy.split(tensor)]
        stride = tuple(math.prod(tensor.shape[d + 1 :]) for d in range(len(tensor.shape)))
        sharded = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(tensor.shape), stride=stride)
        _put(root, tensor.name, nn.Parameter(sharded))
        memory.append(local.numpy().view(np.uint32))
    return root, memory


def _put(root: Any, name: str, parameter: Any) -> None:
    from torch import nn

    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, parameter)


def fill(tensors: Sequence[TensorSpec], strategy: Strategy, memory: Sequence[np.ndarray], rank: int) -> None:
    """Give this rank's shards their values."""
    for tensor, local in zip(tensors, memory, strict=True):
        for rows, bits in values(tensor, strategy.region(tensor, rank)):
            local[rows] = bits.reshape(local[rows].shape)
