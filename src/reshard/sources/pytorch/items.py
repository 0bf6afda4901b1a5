"""The tensors of PyTorch's files as entries: where their bytes begin, found for each when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from threading import Lock

from reshard.catalog import Catalog
from reshard.errors import DataFileError
from reshard.format.safetensors import Header, TensorEntry
from reshard.geometry import DType
from reshard.sources.items import ItemTable
from reshard.sources.pytorch.objects import TensorRef
from reshard.sources.pytorch.values import open_archive, place_of
from reshard.sources.stored import Headers
from reshard.storage import ReadableFile, Storage
from reshard.storage.storage import join

_FIX = "the file is damaged, or of another checkpoint: restore it from a copy"


class ItemHeaders(Headers):
    """What a table of items says of each file, in the words of a file's header. Use from several threads is safe.

    Args:
        storage: where the files lie.
        catalog: of the checkpoint, in the order in which the table was made.
        items: the table.
    """

    def __init__(self, storage: Storage, catalog: Catalog, items: ItemTable) -> None:
        super().__init__(storage, catalog.directory, fix=_FIX)
        self._catalog = catalog
        self._items = items
        self._tensors = list(catalog.tensors.values())
        self._made: dict[str, Header] = {}
        self._making = Lock()

    def get(self, file: str) -> Header:
        """What the table says of a file; the places of its tensors are looked up one by one, when they are asked for."""
        with self._making:
            header = self._made.get(file)
            if header is None:
                path = join(self._catalog.directory, file)
                there = self._storage.stat(path)
                if there is None or there.is_directory:
                    raise DataFileError("a data file is missing", file=path, fix="restore it from a copy")
                entries = _Entries(self._storage, path, self._items.kind, dict(self._rows_of(file)))
                header = self._made[file] = Header(entries, file_size=there.size)
            return header

    def _rows_of(self, file: str) -> Iterator[tuple[str, _Row]]:
        for number, piece_number, begin, size in self._items.rows(file):
            _, name, arrangement = self._tensors[number]
            piece = arrangement.pieces[piece_number]
            suffix = next(site.suffix for site in piece.sites if site.file == file)
            yield name + suffix, (arrangement.dtype, piece.region.shape, begin, size)


_Row = tuple[DType, tuple[int, ...], int, int]


class _Entries(Mapping[str, TensorEntry]):
    """The entries of a file by name."""

    def __init__(self, storage: Storage, path: str, kind: str, rows: dict[str, _Row]) -> None:
        self._storage = storage
        self._path = path
        self._kind = kind
        self._rows = rows
        self._found: dict[str, TensorEntry] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, name: str) -> TensorEntry:
        found = self._found.get(name)
        if found is None:
            dtype, shape, begin, size = self._rows[name]
            with self._storage.open_read(self._path) as file:
                if self._kind == "archive":
                    found = locate_in_archive(file, name, dtype, shape, begin, size)
                else:
                    found = _raw(file, name, dtype, shape, begin, size)
            self._found[name] = found
        return found


def locate_in_archive(file: ReadableFile, name: str, dtype: DType, shape: tuple[int, ...], begin: int, size: int) -> TensorEntry:
    """Where the bytes of a tensor lie that `torch.save` wrote alone into a part of a file.

    Args:
        file: the file.
        name: the tensor's name, for the entry and for errors.
        dtype: the element type that is promised.
        shape: likewise.
        begin: where its archive begins in the file.
        size: the archive's bytes.

    Raises:
        DataFileError: there is no such archive, it holds something else, or a tensor that doesn't lie in row-major order.
        StorageError: the storage refuses.
    """
    records, tensor = open_archive(file, begin, size)
    if type(tensor) is not TensorRef or tensor.dtype != dtype or tensor.shape != shape:
        held = f"{tensor.dtype} of shape {list(tensor.shape)}" if type(tensor) is TensorRef else f"a {type(tensor).__name__}"
        raise DataFileError(
            "a tensor in a file is not what the metadata promises",
            file=file.path,
            tensor=name,
            found=held,
            expected=f"{dtype} of shape {list(shape)}",
            fix=_FIX,
        )
    check_order(tensor, name, file.path)
    at = place_of(records, tensor)
    return TensorEntry(name, dtype, shape, at, at + tensor.nbytes)


def check_order(tensor: TensorRef, name: str, path: str) -> None:
    """See that a tensor's elements lie one after the other in row-major order.

    Raises:
        DataFileError: they don't.
    """
    if not tensor.is_contiguous:
        raise DataFileError(
            "a tensor whose elements are not stored in row-major order can't be read in place",
            file=path,
            tensor=name,
            found=f"strides {list(tensor.strides)} for the shape {list(tensor.shape)}",
            fix="load it with PyTorch and save its .contiguous()",
        )


def _raw(file: ReadableFile, name: str, dtype: DType, shape: tuple[int, ...], begin: int, size: int) -> TensorEntry:
    if begin + size > file.size:
        raise DataFileError(
            "the file is truncated", file=file.path, tensor=name, found=f"{file.size} bytes", expected=f"at least {begin + size}", fix=_FIX
        )
    return TensorEntry(name, dtype, shape, begin, begin + size)
