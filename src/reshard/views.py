"""Global tensors of a stored checkpoint, of which nothing is read until they are sliced. Needs no framework."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np

from reshard.catalog import Chunk, StoredTensor
from reshard.errors import UsageError
from reshard.format.safetensors import BlockCheck, TensorEntry
from reshard.geometry import DType, Layout, Region
from reshard.geometry.casts import cast_values
from reshard.planning.block_scales import BlockScale, plain_face
from reshard.planning.byte_runs import cut_box
from reshard.planning.mapping.lattice import Lattice, clip, moved
from reshard.planning.mapping.linking import Linked
from reshard.planning.mapping.memory import row_boxes, view_of
from reshard.planning.mapping.wanted import face_of
from reshard.sources.stored import Headers
from reshard.state import TensorKey
from reshard.storage import Storage
from reshard.storage.storage import join

# What is read at a time where the destination is not contiguous.
_BLOCK_BYTES = 4 << 20

# A slice with a step reads over gaps below this: a page is the least that a file system reads anyway.
_PAGE_BYTES = 4096

# What is dequantised at a time, in bytes of the quantised tensor; products of four bytes each are made of it.
_SCALED_BYTES = 2 << 20


class TensorView:
    """A global tensor of a stored checkpoint; nothing is read until it is sliced.

    Attributes:
        name: its name in files.
        key: what it is.
        shape: the shape of the whole tensor.
        dtype: its element type.
        layout: how it lay on its mesh when it was saved, or None.
        chunks: the regions that are stored, and where.
        tensor: all of that in one.
        storage: where the checkpoint lies.
        directory: the checkpoint's.
        headers: where in its files the tensors lie.
    """

    # `list(view)` would read element by element: take `view[...]`.
    __iter__ = None

    def __init__(self, name: str, tensor: StoredTensor, storage: Storage, directory: str, headers: Headers) -> None:
        self.name = name
        self.key: TensorKey = tensor.key
        self.shape: tuple[int, ...] = tensor.global_shape
        self.dtype: DType = tensor.dtype
        self.layout: Layout | None = tensor.layout
        self.chunks: tuple[Chunk, ...] = tensor.chunks
        self.tensor = tensor
        self.storage = storage
        self.directory = directory
        self.headers = headers

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor."""
        return self.tensor.nbytes

    def read(self, region: Region | None = None) -> np.ndarray:
        """The values of a region, by default of the whole tensor, whatever chunks they lie in.

        Reads exactly the region's bytes. What is read of chunks in whole row blocks is held against their digests.

        Raises:
            UsageError: the region lies outside the tensor.
            DataFileError: a file is missing or damaged, doesn't hold what metadata promises, or bytes of it are not as they were saved.
            ShortFileError: a file is cut short, perhaps while it is read.
        """
        region = Region.whole(self.shape) if region is None else region
        if not region.fits(self.shape):
            raise UsageError("a region outside the tensor", tensor=self.name, found=region, expected=f"inside {list(self.shape)}")
        # Before memory is taken: a shape that metadata made up has no file that holds it.
        self.locate(region)
        out = np.empty(region.shape, self.dtype.numpy)
        self.read_into(out, region)
        return out

    def read_into(self, out: np.ndarray, region: Region) -> None:
        """Read a region of the tensor into an array of its shape and type, of any strides.

        Raises:
            DataFileError: as `read`.
            ShortFileError: likewise.
        """
        for chunk, common, entry in self.locate(region):
            self._fill(out[common.relative_to(region).slices] if out.ndim else out, chunk, common.relative_to(chunk.region), entry)

    def locate(self, region: Region) -> list[tuple[Chunk, Region, TensorEntry]]:
        """The chunks that a region shares elements with, which these are, and where each chunk lies in its file."""
        parts = [(chunk, common) for chunk in self.chunks if (common := region.intersect(chunk.region)) is not None]
        return [(chunk, common, self.headers.entry(chunk.places[0], self.dtype, chunk.stored_shape)) for chunk, common in parts]

    def _fill(self, out: np.ndarray, chunk: Chunk, box: Region, entry: TensorEntry) -> None:
        itemsize = self.dtype.itemsize
        strides, begin = chunk.strides(itemsize), chunk.begin(itemsize)
        path = join(self.directory, chunk.places[0].file)
        check = BlockCheck(entry, path)
        with self.storage.open_read(path) as file:
            for block in cut_box(box, strides, itemsize, block_bytes=_BLOCK_BYTES, gap_bytes=0):
                target = out[block.region.relative_to(box).slices] if out.ndim else out
                is_direct = target.flags.c_contiguous
                run = memoryview(target.reshape(-1).view(np.uint8) if is_direct else np.empty(block.nbytes, np.uint8))
                file.read_into(entry.begin + begin + block.offset, run)
                check.update(begin + block.offset, run)
                check.raise_if_wrong()
                if not is_direct:
                    # Not by `as_strided`, which knows no float8.
                    target[...] = np.ndarray(block.region.shape, self.dtype.numpy, run, strides=strides)

    def __getitem__(self, index: Any) -> np.ndarray:
        """The values at an index of integers, slices with positive steps, and at most one ellipsis; an array also where nothing is left of
        the dimensions.

        Raises:
            UsageError: another kind of index, or an integer outside the tensor.
        """
        ranges, kept = self._ranges(index)
        shape = tuple(len(wanted) for wanted in ranges)
        if 0 in shape:
            out = np.empty(shape, self.dtype.numpy)
        elif all(wanted.step == 1 for wanted in ranges):
            out = self.read(Region(tuple(wanted.start for wanted in ranges), shape))
        else:
            out = self._read_steps(ranges, shape)
        return out.reshape(tuple(size for size, keep in zip(shape, kept, strict=True) if keep))

    def _read_steps(self, ranges: list[range], shape: tuple[int, ...]) -> np.ndarray:
        self.locate(Region(tuple(r.start for r in ranges), tuple(r[-1] + 1 - r.start for r in ranges)))
        out = np.empty(shape, self.dtype.numpy)
        for spans in product(*(self._spans(dimension, wanted) for dimension, wanted in enumerate(ranges))):
            region = Region(tuple(span.start for _, span, _ in spans), tuple(len(span) for _, span, _ in spans))
            out[tuple(where for where, _, _ in spans)] = self.read(region)[tuple(slice(None, None, step) for _, _, step in spans)]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole tensor, for `numpy.asarray`."""
        return np.asarray(self.read(), dtype)

    def _spans(self, dimension: int, wanted: range) -> list[tuple[slice, range, int]]:
        """What to read along a dimension: where it goes, the indices to read, and the step to take among them."""
        gap = (wanted.step - 1) * self.dtype.itemsize * prod(self.shape[dimension + 1 :])
        if wanted.step == 1 or gap < _PAGE_BYTES:
            return [(slice(0, len(wanted)), range(wanted[0], wanted[-1] + 1), wanted.step)]
        return [(slice(place, place + 1), range(number, number + 1), 1) for place, number in enumerate(wanted)]

    def _ranges(self, index: Any) -> tuple[list[range], list[bool]]:
        """The indices along every dimension, and whether the dimension stays."""
        items = list(index) if isinstance(index, tuple) else [index]
        dots = [place for place, item in enumerate(items) if item is Ellipsis]
        if len(dots) > 1 or len(items) - len(dots) > len(self.shape):
            raise self._bad_index(index, f"at most one '...' and {len(self.shape)} dimensions")
        place = dots[0] if dots else len(items)
        rest = len(self.shape) - (len(items) - len(dots))
        items[place : place + len(dots)] = [slice(None)] * rest
        ranges, kept = [], []
        for item, size in zip(items, self.shape, strict=True):
            if isinstance(item, slice):
                if item.step is not None and not (isinstance(item.step, int) and item.step > 0):
                    raise self._bad_index(index, "a step of 1 or more")
                ranges.append(range(*item.indices(size)))
            elif isinstance(item, (int, np.integer)) and not isinstance(item, bool):
                number = int(item) + size if item < 0 else int(item)
                if not 0 <= number < size:
                    raise self._bad_index(index, f"integers from {-size} to {size - 1} in a dimension of {size}")
                ranges.append(range(number, number + 1))
            else:
                raise self._bad_index(index, "integers, slices and '...'")
            kept.append(isinstance(item, slice))
        return ranges, kept

    def _bad_index(self, index: Any, expected: str) -> UsageError:
        return UsageError("an index that a stored tensor doesn't take", tensor=self.name, found=repr(index), expected=expected)

    def __repr__(self) -> str:
        return f"TensorView({self.name!r}, {self.dtype}, {list(self.shape)}, {len(self.chunks)} chunks)"


class MappedView(TensorView):
    """A tensor under other names than the checkpoint's: what it is made of is read, exactly, when it is sliced. It has no chunks of its
    own.
    """

    def __init__(
        self,
        name: str,
        tensor: StoredTensor,
        storage: Storage,
        directory: str,
        headers: Headers,
        linked: Linked,
        parts: Sequence[TensorView],
    ) -> None:
        super().__init__(name, tensor, storage, directory, headers)
        self._linked = linked
        self._parts = parts

    def read(self, region: Region | None = None) -> np.ndarray:
        region = Region.whole(self.shape) if region is None else region
        if not region.fits(self.shape):
            raise UsageError("a region outside the tensor", tensor=self.name, found=region, expected=f"inside {list(self.shape)}")
        wanted = [
            (part, box, face_of(strand.lattice.left, box, region))
            for strand, part in zip(self._linked.strands, self._parts, strict=True)
            for box in clip(strand.lattice.extents, strand.lattice.left, region)
        ]
        for part, box, _ in wanted:
            part.locate(box)
        out = np.empty(region.shape, self.dtype.numpy)
        for value, lattice in self._linked.fills:
            for box in clip(lattice.extents, lattice.left, region):
                view_of(out, box.shape, face_of(lattice.left, box, region))[...] = np.full((), value, self.dtype.numpy)
        for part, box, face in wanted:
            there = view_of(out, box.shape, face)
            if part.dtype == self.dtype:
                part.read_into(there, box)
            else:
                there[...] = cast_values(part.read(box), self.dtype)
        return out

    def locate(self, region: Region) -> list[tuple[Chunk, Region, TensorEntry]]:
        """Nothing: it has no chunks of its own."""
        return []  # what it is made of is located when it is read


class DequantisedView(TensorView):
    """A tensor that is quantised by block, as the numbers that it stands for: what is read is multiplied by the scale, in float32, and
    rounded. It has no chunks of its own.

    Args:
        raw: the tensor as it is stored, in the coordinates of this view.
        numbers: its scale.
        scale: how the two belong together.
        dtype: what the numbers become.
        lattice: on whose right the stored tensor is; None when the coordinates are its own.
    """

    def __init__(self, raw: TensorView, numbers: TensorView, scale: BlockScale, dtype: DType, lattice: Lattice | None = None) -> None:
        super().__init__(raw.name, raw.tensor.of_type(dtype), raw.storage, raw.directory, raw.headers)
        self._raw = raw
        self._numbers = numbers
        self._scale = scale
        self._lattice = lattice

    def read_into(self, out: np.ndarray, region: Region) -> None:
        if region.is_empty:
            return
        for box in row_boxes(region.shape, self._raw.dtype.itemsize, _SCALED_BYTES):
            place = Region(tuple(a + b for a, b in zip(region.offset, box.offset, strict=True)), box.shape)
            face = plain_face(self.shape, place) if self._lattice is None else moved(self._lattice.right, place.offset)
            part = self._scale.region(face, place.shape)
            values = self._scale.dequantise(self._raw.read(place), self._numbers.read(part), part, face, self.dtype)
            out[box.slices if box.shape else ()] = values

    def locate(self, region: Region) -> list[tuple[Chunk, Region, TensorEntry]]:
        """Where the quantised values lie."""
        return self._raw.locate(region)
