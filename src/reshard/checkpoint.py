"""Open a checkpoint, list it, and slice any of its global tensors. Needs no framework."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from reshard.catalog import Catalog, StoredTensor
from reshard.errors import UsageError
from reshard.families import select_mapper
from reshard.format.common import CommonInfo, read_common
from reshard.format.extra import groups_of, values_in
from reshard.format.metrics import read_metrics
from reshard.format.names import COMMON_FILE, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE, parse_rank_extra_file, tensor_name
from reshard.format.seal import Seal
from reshard.geometry.casts import can_cast
from reshard.geometry.dtypes import by_name
from reshard.planning.block_scales import BlockScale, block_in, quantised_in, scale_of
from reshard.planning.mapping.lattice import Lattice
from reshard.planning.mapping.linking import link
from reshard.planning.mapping.mappers import ATOMS, sizes_in
from reshard.planning.mapping.wanted import Told, run_groups, tell
from reshard.sources.huggingface import read_model_config
from reshard.sources.legacy.saved_under import given_with
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
from reshard.views import DequantisedView, MappedView, TensorView

# What the numbers of block-quantised tensors become where neither caller nor configuration say it: what models are trained in.
_USUAL_DTYPE = "bfloat16"


class Checkpoint:
    """A stored checkpoint, as a collection of global tensors by their names in files.

    Args:
        path: a checkpoint root (its tracker is obeyed), the directory of one checkpoint, a folder of Hugging Face weights, or a
            `SavedUnder`.
        storage: where it lies; the file system by default.
        mapping: to see it under other names: a family of models (its name, or a `Family`), or a `RuleMapping`, whose run's names they are.
        naming: of a family, which of its namings; those of Hugging Face files by default.
        prefixes: where model and optimizer begin in the keys of a checkpoint of PyTorch, when that can't be recognised.
        dequantise: the floating type (`bfloat16`) of what is seen in the place of tensors that are quantised by block and of their scales.
            Not given, they are seen as they are stored; under a mapping, in the type that the model's configuration says.

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
        UsageError: tensors are to be dequantised, and nothing says which their blocks are; or names that the mapping doesn't know.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        storage: Storage | None = None,
        *,
        mapping: Any = None,
        naming: str = ATOMS,
        prefixes: Prefixes = Prefixes(),  # noqa: B008 - frozen
        dequantise: str | None = None,
    ) -> None:
        self._storage: Storage = PosixStorage() if storage is None else storage
        found = resolve(self._storage, os.path.abspath(os.fspath(path)))
        self.directory: str = found.directory
        self.iteration: int | None = found.iteration
        stored = open_source(self._storage, found.directory, prefixes, given_with(path))
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
        self._scales: dict[TensorKey, BlockScale] = {}
        self._values = by_name(_USUAL_DTYPE)
        if mapper is not None or dequantise is not None:
            self._scale(dequantise)
        self._tensors = {tensor_name(key): tensor for key, tensor in self.catalog.tensors.items()}

    def _scale(self, dequantise: str | None) -> None:
        """See quantised tensors as what they stand for."""
        quantised = quantised_in(self._stored, self._stored.tensors)
        if not quantised:
            return
        config = self.config or {}
        self._values = by_name(dequantise or str(config.get("dtype") or config.get("torch_dtype") or _USUAL_DTYPE))
        if not can_cast("float32", self._values.name):
            raise UsageError(
                "quantised numbers become floating ones only", field="dequantise", found=self._values, expected="such as bfloat16"
            )
        block = block_in(config)
        self._scales = {key: scale_of(self._stored, key, scale, block) for key, scale in quantised.items()}
        scales = {scale.key for scale in self._scales.values()}
        tensors: dict[TensorKey, StoredTensor] = {}
        for key, tensor in self.catalog.tensors.items():
            parts = {key} if self._told is None else {strand.stored for strand in self._told.links.tensors[key].strands}
            if not parts <= scales:
                tensors[key] = tensor.of_type(self._values) if parts & self._scales.keys() else tensor
        self.catalog = replace(self.catalog, tensors=tensors)

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

    @cached_property
    def has_rank_values(self) -> bool:
        """Whether ranks have saved values for themselves alone (states of random generators)."""
        there = join(self.directory, EXTRA_DIRECTORY)
        if self._small is not self._storage or self._storage.stat(there) is None:
            return False
        names = sorted(entry.name for entry in self._storage.list(there) if parse_rank_extra_file(entry.name) is not None)
        trees = (read_own_extra(self._storage, self.directory, name, self.seal) for name in names)
        return any(isinstance(tree, Mapping) and tree.get("rank_values") for tree in trees)

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

    @property
    def dequantised(self) -> int:
        """How many stored tensors are quantised by block and seen as what they stand for."""
        return len(self._scales)

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
            return self._view(name, self._stored.tensors[tensor.key], tensor.key)
        linked = self._told.links.tensors[tensor.key]
        held = self._told.catalog.tensors
        if linked.only is not None:
            return self._view(name, held[linked.only.key], linked.only.stored)
        parts = [self._view(held[strand.key].name, held[strand.key], strand.stored, strand.lattice) for strand in linked.strands]
        return MappedView(name, tensor, self._storage, self._stored.directory, self.headers, linked, parts)

    def _view(self, name: str, tensor: StoredTensor, stored: TensorKey, lattice: Lattice | None = None) -> TensorView:
        """A stored tensor, or the part of one that a lattice has on its right, as values."""
        view = TensorView(name, tensor, self._storage, self._stored.directory, self.headers)
        scale = self._scales.get(stored)
        if scale is None:
            return view
        numbers = TensorView(scale.tensor.name, scale.tensor, self._storage, self._stored.directory, self.headers)
        return DequantisedView(view, numbers, scale, self._values, lattice)

    def __repr__(self) -> str:
        return f"Checkpoint({self.directory!r}, {len(self)} tensors)"


def _parameter(key: TensorKey) -> TensorKey:
    return model_key(key.parameter)
