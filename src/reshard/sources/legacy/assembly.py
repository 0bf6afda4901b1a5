"""What the files of all ranks hold becomes a catalog, under the strategy that cut the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from reshard.catalog import Arrangement, Catalog, StoredTensor
from reshard.errors import MetadataError
from reshard.format.names import tensor_name
from reshard.geometry import Layout, Mesh
from reshard.sources.items import ItemTable
from reshard.sources.legacy.arranging import Held, Laid, arrange, likeness
from reshard.sources.legacy.naming import Named, common_of, some, understand
from reshard.sources.legacy.saved_file import FileTensor, SavedFile
from reshard.sources.legacy.strategy import Strategy
from reshard.sources.made import made_files
from reshard.sources.stored import Stored
from reshard.state import Kind, TensorKey
from reshard.storage import Storage
from reshard.storage.storage import join

# What a strategy says nothing of are step counts and learning rates, the same on every rank: they may be so large, and are compared.
_MOST_UNNAMED_BYTES = 1 << 16


def assemble(
    storage: Storage, directory: str, files: Sequence[SavedFile], strategy: Strategy | None, step: int | None, notes: Sequence[str]
) -> Stored:
    """The checkpoint that files make up together.

    Args:
        storage: where they lie.
        directory: of the checkpoint.
        files: what each rank's holds.
        strategy: of the run that saved them; None where one file has all.
        step: what the files' names say; None where they don't.
        notes: what the reader should know of the choice of the files.

    Raises:
        DataFileError: a part of a tensor is in no file.
        MetadataError: files and strategy don't fit together.
        LayoutError: the strategy contradicts itself.
        StorageError: the storage refuses.
    """
    return _Assembly(storage, directory, files, strategy, list(notes)).stored(step)


@dataclass
class _Assembly:
    """A checkpoint while its files become a catalog.

    Attributes:
        storage: where it lies.
        directory: of the checkpoint.
        files: what each rank's file holds.
        strategy: None where there is one file.
        notes: what the reader should know, so far.
    """

    storage: Storage
    directory: str
    files: Sequence[SavedFile]
    strategy: Strategy | None
    notes: list[str] = field(default_factory=list)

    def stored(self, step: int | None) -> Stored:
        """All of it."""
        held: dict[str, dict[int, Held]] = {}
        for file in self.files:
            for name, tensor in file.tensors.items():
                held.setdefault(name, {})[file.rank] = Held(file.file, tensor)
        named = understand({name: next(iter(own.values())).tensor for name, own in held.items()})
        unnamed: list[str] = []
        tensors: dict[TensorKey, StoredTensor] = {}
        rows: dict[str, list[tuple[int, int, int, int]]] = {}
        known: dict[tuple[object, ...], Laid] = {}
        astray: dict[str, tuple[int, ...]] = {}
        for name, key in named.keys.items():
            layouts = self._layouts(name, held[name], unnamed)
            alike = likeness(held[name], layouts)
            laid = known.get(alike)
            if laid is None:
                laid = known[alike] = self._lay(name, held[name], layouts)
            if key in tensors:
                raise MetadataError(
                    "two tensors would have the same name",
                    file=self.directory,
                    tensor=tensor_name(key),
                    found=name,
                )
            if laid.ignored:
                astray[name] = laid.ignored
            for file, piece, begin, nbytes in laid.rows(held[name]):
                rows.setdefault(file, []).append((len(tensors), piece, begin, nbytes))
            tensors[key] = StoredTensor(key, tensor_name(key), laid.arrangement)
        self._compare({name: held[name] for name in unnamed if len(held[name]) > 1})
        self._note(named, unnamed, astray)
        common, notes = common_of({name: self._value(held[name]) for name in named.counters}, step)
        texts = {name: text for file in reversed(self.files) for name, text in file.texts.items()}
        catalog = Catalog(self.directory, tensors, (*self.notes, *notes))
        is_weights = not any(key.kind is Kind.OPTIMIZER for key in tensors)
        files = made_files(common, {"extra": texts} if texts else {})
        return Stored(catalog, is_weights=is_weights, files=files, items=ItemTable.of("raw", rows))

    def _layouts(self, name: str, held: Mapping[int, Held], unnamed: list[str]) -> list[Layout]:
        """How a tensor lay; what the strategy doesn't name is added to `unnamed`, and whole on every rank."""
        if self.strategy is None:
            return []
        tensor = next(iter(held.values())).tensor
        layouts = self.strategy.layouts(name, sorted(held), len(tensor.shape))
        if layouts is not None:
            return layouts
        if len(held) > 1 and tensor.nbytes > _MOST_UNNAMED_BYTES:
            raise MetadataError(
                "the strategy says nothing of a tensor that several ranks have",
                file=self.strategy.origin,
                tensor=name,
                found=f"{tensor.dtype} of shape {list(tensor.shape)} in the files of ranks {some(sorted(held))}",
                fix="give the strategy files of all pipeline stages, or in a table of layouts a pattern for it: null, if each rank has all",
            )
        unnamed.append(name)
        return [Layout.replicated(Mesh((len(held),), ("ranks",), tuple(held)), len(tensor.shape))]

    def _lay(self, name: str, held: Mapping[int, Held], layouts: Sequence[Layout]) -> Laid:
        if layouts:
            return arrange(name, held, layouts, self.directory)
        ((rank, own),) = held.items()
        laid = arrange(name, held, [Layout.replicated(Mesh((1,), ("ranks",), (rank,)), len(own.tensor.shape))], self.directory)
        found = laid.arrangement
        return Laid(Arrangement(found.dtype, found.global_shape, None, found.pieces), laid.stored)

    def _compare(self, held: Mapping[str, Mapping[int, Held]]) -> None:
        """See that all ranks have the same of what is taken from any of them."""
        by_file: dict[str, list[tuple[str, int, FileTensor]]] = {}
        for name, own in held.items():
            for rank, one in own.items():
                by_file.setdefault(one.file, []).append((name, rank, one.tensor))
        first: dict[str, tuple[int, bytes]] = {}
        for file, wanted in by_file.items():
            with self.storage.open_read(join(self.directory, file)) as opened:
                for name, rank, tensor in wanted:
                    value = _bytes_of(opened.read_into, tensor)
                    of, known = first.setdefault(name, (rank, value))
                    if value != known:
                        raise MetadataError(
                            "ranks have different values of a tensor of which the strategy says nothing",
                            file=join(self.directory, file),
                            tensor=name,
                            rank=rank,
                            found=f"other bytes than on rank {of}",
                            fix="give the strategy files of all ranks; or a table in which a layout over one rank says whose value counts",
                        )

    def _value(self, held: Mapping[int, Held]) -> np.ndarray:
        """A small tensor, of the first rank that has it."""
        own = next(iter(held.values()))
        with self.storage.open_read(join(self.directory, own.file)) as opened:
            return np.frombuffer(_bytes_of(opened.read_into, own.tensor), own.tensor.dtype.numpy)

    def _note(self, named: Named, unnamed: Sequence[str], astray: Mapping[str, tuple[int, ...]]) -> None:
        left_out = list(dict.fromkeys(words for file in self.files for words in file.left_out))
        if left_out:
            self.notes.append(f"tensors of element types that checkpoints don't hold were left out: {some(left_out)}")
        self.notes += dict.fromkeys(note for file in self.files for note in file.notes)
        self.notes += named.notes
        if unnamed:
            self.notes.append(
                f"the strategy says nothing of some tensors, and each was taken as it is on the ranks that have it: {some(unnamed)}"
            )
        if astray:
            name, ranks = next(iter(astray.items()))
            self.notes.append(
                f"{len(astray)} tensors lie also on ranks where the strategy has none, which were left out: {name} on {some(ranks)}"
            )


def _bytes_of(read_into: Callable[[int, memoryview], None], tensor: FileTensor) -> bytes:
    """The bytes of a small tensor, whose parts follow each other."""
    data = bytearray(tensor.nbytes)
    at = 0
    for part in tensor.parts:
        nbytes = part.region.size * tensor.dtype.itemsize
        read_into(part.begin, memoryview(data)[at : at + nbytes])
        at += nbytes
    return bytes(data)
