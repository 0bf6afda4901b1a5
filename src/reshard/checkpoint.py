"""Open a checkpoint, list it, and slice any of its global tensors. Needs no framework."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import numpy as np

from reshard.catalog import Catalog, Chunk, StoredTensor
from reshard.errors import UsageError
from reshard.families import select_mapper
from reshard.format.common import CommonInfo, read_common
from reshard.format.extra import groups_of, values_in
from reshard.format.metrics import read_metrics
from reshard.format.names import COMMON_FILE, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE, tensor_name
from reshard.format.safetensors import BlockCheck, TensorEntry
from reshard.format.seal import Seal
from reshard.geometry import DType, Layout, Region
from reshard.planning.byte_runs import cut_box
from reshard.planning.mapping.lattice import clip
from reshard.planning.mapping.linking import Linked, link
from reshard.planning.mapping.mappers import ATOMS, sizes_in
from reshard.planning.mapping.memory import view_of
from reshard.planning.mapping.wanted import Told, face_of, run_groups, tell
from reshard.sources.huggingface import read_model_config
from reshard.sources.native import check_promises, read_own_extra
from reshard.sources.opening import headers_of, open_source
from reshard.sources.pytorch.naming import Prefixes
from reshard.sources.relay import held_in_memory
from reshard.sources.resolve import resolve
from reshard.sources.stored import Headers
from reshard.state import Kind, ParameterGroup, TensorKey, model_key
from reshard.storage import Storage
from reshard.storage.posix import PosixStorage
from reshard.storage.storage import join

# What is read at a time where the destination is not contiguous.
_BLOCK_BYTES = 4 << 20

# A slice with a step reads over gaps below this: a page is the least that a file system reads anyway.
_PAGE_BYTES = 4096


class Checkpoint:
    """A stored checkpoint, as a collection of global tensors by their names in files.

    Args:
        path: a checkpoint root (its tracker is obeyed), the directory of one checkpoint, or a folder of Hugging Face weights.
        storage: where it lies; the file system by default.
        mapping: to see it under other names: a family of models (its name, or a `Family`), or a `RuleMapping`, whose run's names they are.
        naming: of a family, which of its namings; those of Hugging Face files by default.
        prefixes: where model and optimizer begin in the keys of a checkpoint of PyTorch, when that can't be recognised.

    Attributes:
        directory: where its files lie.
        iteration: its number; None when the directory's name has none.
        catalog: what it holds, as data; under other names without chunks.
        seal: which files it consists of, and their digests; None when it has none.
        common: the progress of the run (`common.json`); None when there is no such file.
        notes: what the reader should know about how it was found and what it lacks.
        headers: where in its files the tensors lie.

    Raises:
        CheckpointNotFoundError: there is no checkpoint.
        DamagedCheckpointError: tracker, metadata or common information are damaged.
        StorageError: the storage refuses to read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        storage: Storage | None = None,
        *,
        mapping: Any = None,
        naming: str = ATOMS,
        prefixes: Prefixes = Prefixes(),  # noqa: B008 - frozen
    ) -> None:
        self._storage: Storage = PosixStorage() if storage is None else storage
        found = resolve(self._storage, os.path.abspath(os.fspath(path)))
        self.directory: str = found.directory
        self.iteration: int | None = found.iteration
        stored = open_source(self._storage, found.directory, prefixes)
        self.catalog: Catalog = stored.catalog
        self.seal: Seal | None = stored.seal
        # A foreign checkpoint has no files of ours: what it says is made into them.
        made = {join(found.directory, name): data for name, data in stored.files.items()}
        self._small = self._storage if stored.items is None else held_in_memory(made)
        self.common: CommonInfo | None = read_common(self._small, join(found.directory, COMMON_FILE))
        self.notes: tuple[str, ...] = (*found.notes, *self.catalog.notes)
        self.headers: Headers = headers_of(self._storage, stored.catalog, stored.seal, stored.items)
        self._stored: Catalog = stored.catalog
        self._told: Told | None = None
        mapper = select_mapper(mapping)
        if mapper is not None:
            names = [key.parameter for key in stored.catalog.tensors if key.kind is Kind.MODEL]
            sides = mapper.named(names, naming, sizes_in(self.config))
            self._told = tell(stored.catalog, link(stored.catalog, sides))
            repeated = self._told.links.repeated
            named = self._told.as_run(stored.catalog)
            self.catalog = replace(named, tensors={key: tensor for key, tensor in named.tensors.items() if _parameter(key) not in repeated})
        self._tensors = {tensor_name(key): tensor for key, tensor in self.catalog.tensors.items()}

    @property
    def values(self) -> Mapping[str, Any]:
        """The global values that were saved beside the tensors (scheduler, data position, extras); empty when there are none."""
        return values_in(self._extra, self._extra_file)

    @cached_property
    def metrics(self) -> Mapping[str, float]:
        """The numbers that were saved with it, by name; empty when there are none."""
        return read_metrics(self._storage, self.directory, self.seal)

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The description of the model in Hugging Face's words (`config.json`): the folder's, or the value `config` of the extras that a
        run saved (`extra={"config": model.config.to_dict()}`); None when there is none.
        """
        given = read_model_config(self._storage, self.directory)
        if given is None:
            extra = self.values.get("extra")
            given = extra.get("config") if isinstance(extra, Mapping) else None
        return given if isinstance(given, Mapping) else None

    @property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """The optimizers' hyper-parameters; empty when there are none."""
        groups = groups_of(self._extra, self._extra_file)
        return groups if self._told is None else run_groups(groups, self._told)

    @property
    def _extra_file(self) -> str:
        return join(self.directory, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE)

    @cached_property
    def _extra(self) -> Any:
        return read_own_extra(self._small, self.directory, GLOBAL_EXTRA_FILE, self.seal)

    def check(self, names: Iterable[str] | None = None) -> tuple[str, ...]:
        """Hold the headers of files against the metadata.

        Args:
            names: only the files that hold these tensors; all files by default.

        Returns:
            Notes about tensors in files that the metadata doesn't list.

        Raises:
            DataFileError: a file is missing or damaged, or doesn't hold what was promised.
        """
        if names is None:
            return check_promises(self._stored, self.headers)
        chosen = {place.file for name in names for tensor in self._parts(name) for chunk in tensor.chunks for place in chunk.places}
        return check_promises(self._stored, self.headers, chosen)

    def _parts(self, name: str) -> list[StoredTensor]:
        """What a tensor consists of in files: itself, or its strands."""
        tensor = self._tensors[name]
        if self._told is None:
            return [tensor]
        return [self._told.catalog.tensors[strand.key] for strand in self._told.links.tensors[tensor.key].strands]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> TensorView:
        tensor = self._tensors.get(name)
        if tensor is None:
            near = difflib.get_close_matches(str(name), self._tensors, n=3, cutoff=0.5)
            raise UsageError(
                "the checkpoint has no tensor of this name",
                file=self.directory,
                tensor=name,
                expected=f"one of {len(self)} names" + (f", such as {', '.join(near)}" if near else ""),
            )
        if self._told is None:
            return TensorView(name, tensor, self._storage, self._stored.directory, self.headers)
        linked = self._told.links.tensors[tensor.key]
        if linked.only is not None:
            return TensorView(name, self._told.catalog.tensors[linked.only.key], self._storage, self._stored.directory, self.headers)
        parts = [TensorView(part.name, part, self._storage, self._stored.directory, self.headers) for part in self._parts(name)]
        return MappedView(name, tensor, self._storage, self._stored.directory, self.headers, linked, parts)

    def __repr__(self) -> str:
        return f"Checkpoint({self.directory!r}, {len(self)} tensors)"


def _parameter(key: TensorKey) -> TensorKey:
    return model_key(key.parameter)


class TensorView:
    """A global tensor of a stored checkpoint; nothing is read until it is sliced.

    Attributes:
        name: its name in files.
        key: what it is.
        shape: the shape of the whole tensor.
        dtype: its element type.
        layout: how it lay on its mesh when it was saved, or None.
        chunks: the regions that are stored, and where.
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
        self._tensor = tensor
        self._storage = storage
        self._directory = directory
        self._headers = headers

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor."""
        return self._tensor.nbytes

    def read(self, region: Region | None = None) -> np.ndarray:
        """The values of a region, by default of the whole tensor, whatever chunks they lie in.

        Reads exactly the region's bytes. What is read of chunks in whole row blocks is held against their digests.

        Raises:
            UsageError: the region lies outside the tensor.
            DataFileError: a file is missing or damaged, doesn't hold what metadata promises, or bytes of it are not as they were saved.
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
        """
        for chunk, common, entry in self.locate(region):
            self._fill(out[common.relative_to(region).slices] if out.ndim else out, chunk, common.relative_to(chunk.region), entry)

    def locate(self, region: Region) -> list[tuple[Chunk, Region, TensorEntry]]:
        """The chunks that a region shares elements with, which these are, and where each chunk lies in its file."""
        parts = [(chunk, common) for chunk in self.chunks if (common := region.intersect(chunk.region)) is not None]
        return [(chunk, common, self._headers.entry(chunk.places[0], self.dtype, chunk.stored_shape)) for chunk, common in parts]

    def _fill(self, out: np.ndarray, chunk: Chunk, box: Region, entry: TensorEntry) -> None:
        itemsize = self.dtype.itemsize
        strides, begin = chunk.strides(itemsize), chunk.begin(itemsize)
        path = join(self._directory, chunk.places[0].file)
        check = BlockCheck(entry, path)
        with self._storage.open_read(path) as file:
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
            part.read_into(view_of(out, box.shape, face), box)
        return out

    def locate(self, region: Region) -> list[tuple[Chunk, Region, TensorEntry]]:
        """Nothing: it has no chunks of its own."""
        return []  # what it is made of is located when it is read
