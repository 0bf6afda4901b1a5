"""Meshes and layouts: how a global tensor lies on ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from reshard.errors import LayoutError
from reshard.geometry.boxes import Boxes
from reshard.geometry.region import Region

# The contract gives a virtual mesh axis (micro-slices on one card) this name, and only in the last place.
INTERLEAVED_AXIS = "interleaved_parallel"


@dataclass(frozen=True)
class Mesh:
    """Named axes over ranks.

    Attributes:
        shape: the size of each axis, outermost first.
        axes: the name of each axis; unique, not empty.
        ranks: the global ranks in row-major order of the mesh coordinates; `prod(shape)` of them. Any ranks, in any order: the
            stages of a pipeline have meshes over different ranks.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise LayoutError("a mesh needs one name per axis", found=f"shape {self.shape}, axes {self.axes}")
        if any(size < 1 for size in self.shape):
            raise LayoutError("the axes of a mesh have at least one place", field="device_matrix", found=self.shape)
        if len(set(self.axes)) != len(self.axes) or any(name in ("", "None") for name in self.axes):
            raise LayoutError("the names of a mesh's axes are unique, not empty and not 'None'", field="alias_name", found=self.axes)
        if len(self.ranks) != math.prod(self.shape):
            raise LayoutError(
                "a mesh has one rank per place",
                field="rank_list",
                found=f"{len(self.ranks)} ranks",
                expected=f"{math.prod(self.shape)} for shape {self.shape}",
            )

    @cached_property
    def _positions(self) -> dict[int, int]:
        return {rank: position for position, rank in reversed(list(enumerate(self.ranks)))}

    def __contains__(self, rank: int) -> bool:
        return rank in self._positions

    def position(self, rank: int) -> int:
        """The place of a global rank in `ranks` (its first, if it has several).

        Raises:
            LayoutError: the rank is not in the mesh.
        """
        try:
            return self._positions[rank]
        except KeyError:
            raise LayoutError("the rank is not in the mesh", rank=rank, found=f"mesh over ranks {self.ranks}") from None

    def coordinate(self, position: int) -> tuple[int, ...]:
        """The mesh coordinate of a place in `ranks`, row-major."""
        coordinate = []
        for size in reversed(self.shape):
            position, index = divmod(position, size)
            coordinate.append(index)
        return tuple(reversed(coordinate))

    @cached_property
    def coordinates(self) -> np.ndarray:
        """The coordinates of all places: int64, of shape (axes, places)."""
        return np.indices(self.shape).reshape(len(self.shape), len(self.ranks))


@dataclass(frozen=True)
class Layout:
    """How a global tensor lies on a mesh.

    Attributes:
        mesh: the mesh.
        split: for each dimension of the tensor the mesh axes (indices into `mesh.axes`) that split it, outermost first; an empty
            tuple where it isn't split. An axis that splits nothing replicates.

    A dimension of n elements split in k gives each part `ceil(n / k)` elements, the last parts fewer or none (as PyTorch splits).
    Several axes split one after the other, outermost first. Where k divides n this is the contract's even split.
    """

    mesh: Mesh
    split: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        used = [axis for axes in self.split for axis in axes]
        if any(not 0 <= axis < len(self.mesh.shape) for axis in used):
            raise LayoutError(
                "a layout splits by an axis that the mesh doesn't have", found=self.split, expected=f"0 to {len(self.mesh.shape) - 1}"
            )
        if len(set(used)) != len(used):
            raise LayoutError("a mesh axis splits a tensor at most once", found=self.split)

    @classmethod
    def replicated(cls, mesh: Mesh, dimensions: int) -> Layout:
        """Every rank of the mesh holds the whole tensor."""
        return cls(mesh, ((),) * dimensions)

    @property
    def fragments(self) -> tuple[int, ...]:
        """The number of parts of each dimension: the contract's `axis_fragmentations`."""
        return tuple(math.prod(self.mesh.shape[axis] for axis in axes) for axes in self.split)

    def is_even(self, global_shape: tuple[int, ...]) -> bool:
        """Whether every part of every dimension has the same number of elements: what the contract's layout can say."""
        return all(size % parts == 0 for size, parts in zip(global_shape, self.fragments, strict=True))

    def slice_id(self, position: int) -> int:
        """The contract's linear slice id of a place in `mesh.ranks`.

        The mixed-radix number whose digits are the mesh coordinates of the splitting axes, dimension by dimension, outermost axis first,
        the last digit fastest: the row-major index over the numbers of parts.
        """
        coordinate = self.mesh.coordinate(position)
        number = 0
        for axes in self.split:
            for axis in axes:
                number = number * self.mesh.shape[axis] + coordinate[axis]
        return number

    def slice_ids(self) -> np.ndarray:
        """The slice id of every place in `mesh.ranks`: int64."""
        numbers = np.zeros(len(self.mesh.ranks), np.int64)
        for axes in self.split:
            for axis in axes:
                numbers = numbers * self.mesh.shape[axis] + self.mesh.coordinates[axis]
        return numbers

    def region(self, position: int, global_shape: tuple[int, ...]) -> Region:
        """What a place in `mesh.ranks` holds of a tensor of this shape.

        Raises:
            LayoutError: the shape has another number of dimensions than the layout.
        """
        self._check_dimensions(global_shape)
        coordinate = self.mesh.coordinate(position)
        offset, shape = [], []
        for size, axes in zip(global_shape, self.split, strict=True):
            begin = 0
            for axis in axes:
                part = -(-size // self.mesh.shape[axis])
                first = min(coordinate[axis] * part, size)
                size = min(part, size - first)
                begin += first
            offset.append(begin)
            shape.append(size)
        return Region(tuple(offset), tuple(shape))

    def regions(self, global_shape: tuple[int, ...]) -> Boxes:
        """What every place in `mesh.ranks` holds of a tensor of this shape.

        Raises:
            LayoutError: the shape has another number of dimensions than the layout.
        """
        self._check_dimensions(global_shape)
        places = len(self.mesh.ranks)
        offsets, shapes = np.zeros((len(global_shape), places), np.int64), np.empty((len(global_shape), places), np.int64)
        for d, axes in enumerate(self.split):
            size = np.full(places, global_shape[d])
            for axis in axes:
                part = -(-size // self.mesh.shape[axis])
                first = np.minimum(self.mesh.coordinates[axis] * part, size)
                size = np.minimum(part, size - first)
                offsets[d] += first
            shapes[d] = size
        return Boxes(offsets, shapes)

    def _check_dimensions(self, global_shape: tuple[int, ...]) -> None:
        if len(global_shape) != len(self.split):
            raise LayoutError(
                "layout and tensor have different numbers of dimensions",
                found=f"shape {global_shape}",
                expected=f"{len(self.split)} dimensions",
            )

    def rank_region(self, rank: int, global_shape: tuple[int, ...]) -> Region:
        """What a global rank holds of a tensor of this shape.

        Raises:
            LayoutError: the rank is not in the mesh, or the shape doesn't fit.
        """
        return self.region(self.mesh.position(rank), global_shape)
