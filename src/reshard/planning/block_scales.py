"""Tensors that are quantised by block: which scale belongs to which, and which of its numbers to which elements.

A quantised tensor `w` holds numbers of one byte, and `w_scale_inv` what each block of them is multiplied by, as the folders of DeepSeek-V3
and Qwen3-FP8 have it. Blocks go over the last dimensions; those at the ends of the tensor may be filled in part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reshard.catalog import Catalog, StoredTensor
from reshard.errors import MismatchError, UsageError
from reshard.geometry import DType, Region
from reshard.geometry.casts import cast_values
from reshard.planning.mapping.lattice import Face
from reshard.state import Kind, TensorKey

_SUFFIX = "_scale_inv"
# Other programs call so what a whole tensor, or each row of it, is multiplied by. To load such numbers without it would be to load others.
_OTHER_SUFFIX = "_scale"

_QUANTISED = frozenset({"float8_e4m3fn", "float8_e5m2"})
_SCALES = frozenset({"float32", "bfloat16", "float16"})


@dataclass(frozen=True)
class BlockScale:
    """The scale of a quantised tensor.

    Attributes:
        key: of the scale in the checkpoint.
        tensor: the scale.
        block: the extents of a block, one for each dimension of the quantised tensor.
    """

    key: TensorKey
    tensor: StoredTensor
    block: tuple[int, ...]

    def region(self, face: Face, extents: Sequence[int]) -> Region:
        """The numbers that belong to elements of the quantised tensor.

        Args:
            face: where these elements lie in it.
            extents: of the box that they are.
        """
        last = list(face.offset)
        for n, d, step in zip(extents, face.dims, face.steps, strict=True):
            last[d] += (n - 1) * step
        begin = tuple(o // b for o, b in zip(face.offset, self.block, strict=True))
        return Region(begin, tuple(o // b + 1 - first for o, b, first in zip(last, self.block, begin, strict=True)))

    def dequantise(self, values: np.ndarray, numbers: np.ndarray, region: Region, face: Face, dtype: DType) -> np.ndarray:
        """The values of elements: the products are made in float32, then rounded.

        Args:
            values: as they are stored.
            numbers: a part of the scale that has all that these elements need.
            region: which part.
            face: where the elements lie in the quantised tensor.
            dtype: what they become.
        """
        return cast_values(values.astype(np.float32) * self._factors(numbers, region, face, values.shape), dtype)

    def _factors(self, numbers: np.ndarray, region: Region, face: Face, extents: Sequence[int]) -> np.ndarray:
        """What each element is multiplied by: float32, of the box's extents."""
        # The elements along a dimension are in the rows or in the columns of the scale, whose last dimension is that of its columns.
        final = len(self.block) - 1
        rows: list[int] = []
        columns: list[int] = []
        for axis, d in enumerate(face.dims):
            (columns if d == final else rows).append(axis)
        row = np.zeros((1,) * len(rows), np.int64)
        for d in range(final):
            row = row * region.shape[d] + self._blocks(d, face, extents, rows) - region.offset[d]
        column = self._blocks(final, face, extents, columns) - region.offset[final]
        row, column = row.reshape(-1), column.reshape(-1)
        first = int(row.min())
        used = numbers.reshape(-1, region.shape[final])[first : int(row.max()) + 1].astype(np.float32)
        found = used[:, column].take(row - first, axis=0)
        order = (*rows, *columns)
        return found.reshape([extents[axis] for axis in order]).transpose(np.argsort(order))

    def _blocks(self, dimension: int, face: Face, extents: Sequence[int], axes: Sequence[int]) -> np.ndarray:
        """The number of the block along a dimension, for each place along some axes."""
        place = np.full([1] * len(axes), face.offset[dimension])
        for index, axis in enumerate(axes):
            if face.dims[axis] == dimension:
                steps = face.steps[axis] * np.arange(extents[axis])
                place = place + steps.reshape([-1 if other == index else 1 for other in range(len(axes))])
        shape = [extents[axis] for axis in axes]
        return np.broadcast_to(place // self.block[dimension], shape)


def plain_face(shape: tuple[int, ...], region: Region) -> Face:
    """Where a region of a tensor lies in it, seen as a box with an axis for each dimension."""
    return Face(shape, region.offset, tuple(range(len(shape))), (1,) * len(shape))


def block_in(config: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    """The extents of the blocks that a model's configuration tells of: over its weights' last dimensions; None when it tells of none.

    Raises:
        UsageError: it tells of what can't be blocks.
    """
    quantised = config.get("quantization_config") if config is not None else None
    block = quantised.get("weight_block_size") if isinstance(quantised, Mapping) else None
    if block is None:
        return None
    if not isinstance(block, list | tuple) or not block or not all(type(extent) is int and extent > 0 for extent in block):
        raise UsageError(
            "blocks of quantised weights that can't be",
            field="quantization_config.weight_block_size",
            found=repr(block),
            expected="numbers above 0, such as [128, 128]",
        )
    return tuple(block)


def may_be_quantised(catalog: Catalog) -> bool:
    """Whether a checkpoint holds any tensor of a type in which `quantised_in` finds some: asked once for all that lie alike."""
    return any(arrangement.dtype.name in _QUANTISED for arrangement in catalog.arrangements)


def quantised_in(catalog: Catalog, keys: Iterable[TensorKey]) -> dict[TensorKey, TensorKey]:
    """Those of some tensors that are quantised, each with its scale: by block, or in a way that `scale_of` refuses.

    Args:
        catalog: what the checkpoint holds.
        keys: of its tensors.
    """
    found: dict[TensorKey, TensorKey] = {}
    for key in keys:
        if key.kind is Kind.MODEL and catalog.tensors[key].dtype.name in _QUANTISED:
            for suffix in (_SUFFIX, _OTHER_SUFFIX):
                scale = key._replace(parameter=key.parameter + suffix)
                if scale in catalog.tensors:
                    found[key] = scale
                    break
    return found


def scale_of(catalog: Catalog, key: TensorKey, scale: TensorKey, block: tuple[int, ...] | None) -> BlockScale:
    """The scale of a quantised tensor, held against its shape.

    Args:
        catalog: what the checkpoint holds.
        key: the quantised tensor.
        scale: its scale's, as `quantised_in` found it.
        block: as `block_in` gave it.

    Raises:
        UsageError: nobody knows the blocks, or the tensor isn't quantised by block.
        MismatchError: the scale has another shape than they make.
    """
    tensor, numbers = catalog.tensors[key], catalog.tensors[scale]
    if not scale.parameter.endswith(_SUFFIX) or numbers.dtype.name not in _SCALES:
        raise UsageError(
            "a tensor is quantised in a way that can't be dequantised here",
            file=catalog.directory,
            tensor=tensor.name,
            found=f"{tensor.dtype} with {numbers.name} of shape {list(numbers.global_shape)}, {numbers.dtype}",
            expected=f"blocks, with {tensor.name}{_SUFFIX} of {' or '.join(sorted(_SCALES))}; or tensors that aren't quantised",
            fix="take the folder of the model that isn't quantised, or dequantise it with the program that made it",
        )
    if block is None:
        raise UsageError(
            "a tensor is quantised by block, and nothing says by which",
            file=catalog.directory,
            tensor=tensor.name,
            field="quantization_config.weight_block_size",
            found=f"{tensor.dtype} with {numbers.name}",
            expected="a config.json in the folder that has it, or the run's saved configuration (extra={'config': …})",
        )
    shape = tensor.global_shape
    whole = (1,) * (len(shape) - len(block)) + block
    grid = tuple(-(-extent // b) for extent, b in zip(shape, whole, strict=False))
    if len(whole) != len(shape) or numbers.global_shape != grid:
        raise MismatchError(
            "the scale of a quantised tensor has another shape than its blocks make",
            file=catalog.directory,
            tensor=numbers.name,
            field="quantization_config.weight_block_size",
            found=f"{list(numbers.global_shape)} for {tensor.name} of shape {list(shape)}",
            expected=f"{list(grid)}: blocks of {list(block)}",
            fix="the configuration is of another model, or the folder isn't whole",
        )
    return BlockScale(scale, numbers, whole)


def united(regions: Iterable[Region]) -> list[Region]:
    """Boxes that have all of some regions; those that overlap or touch are one wherever that adds nothing."""
    found: list[Region] = []
    for region in dict.fromkeys(regions):
        current = region
        while True:
            mate = next((other for other in found if _hull(current, other).size <= current.size + other.size), None)
            if mate is None:
                break
            found.remove(mate)
            current = _hull(current, mate)
        found.append(current)
    return found


def _hull(one: Region, other: Region) -> Region:
    begin = tuple(min(a, b) for a, b in zip(one.offset, other.offset, strict=True))
    return Region(begin, tuple(max(a, b) - first for a, b, first in zip(one.end, other.end, begin, strict=True)))
