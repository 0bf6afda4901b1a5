"""An opened source: what every kind of stored checkpoint becomes, so that loading and export know one of them only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock

from reshard.catalog import Catalog, Place
from reshard.errors import DataFileError
from reshard.format.index import encode_index
from reshard.format.safetensors import Header, TensorEntry, read_header
from reshard.format.seal import Seal
from reshard.geometry import DType
from reshard.sources.items import ItemTable
from reshard.storage import Storage
from reshard.storage.storage import join

_RESTORE = "restore the file from a copy, or resume from another iteration"


@dataclass(frozen=True)
class Stored:
    """A stored checkpoint, opened.

    Attributes:
        catalog: what it holds.
        seal: what it consists of; None when another program wrote it, or an older version.
        index: the bytes of its compact index, where there is one and it is up to date.
        is_weights: whether it is a model's weights and nothing else: no run can be resumed from it.
        files: small files as a checkpoint of ours has them, by their names in it: made of what a foreign one says.
        items: where the tensors lie, when the files have no headers that say it.
    """

    catalog: Catalog
    seal: Seal | None = None
    index: bytes | None = None
    is_weights: bool = False
    files: Mapping[str, bytes] = field(default_factory=dict)
    items: ItemTable | None = None

    def encode_index(self) -> bytes:
        """The catalog as the bytes of an index, for the other ranks of a job: one of them opens a checkpoint for all."""
        return encode_index(self.catalog, b"") if self.index is None else self.index


class Headers:
    """The headers of a checkpoint's files, each read when it is first needed. Use from several threads is safe.

    Args:
        storage: where the files lie.
        directory: the checkpoint's directory.
        seal: the checkpoint's: then every header must be as it was sealed.
        fix: what an error about a file says to do.
        digests: whether anybody wants those of the tensors.
    """

    def __init__(self, storage: Storage, directory: str, seal: Seal | None = None, *, fix: str = _RESTORE, digests: bool = True) -> None:
        self._storage = storage
        self._directory = directory
        self._seal = seal
        self._fix = fix
        self._digests = digests
        self._headers: dict[str, Header] = {}
        self._lock = Lock()

    def get(self, file: str) -> Header:
        """The header of a file, by its name in the directory.

        Raises:
            DataFileError: the file is missing or damaged, or isn't the one that was sealed.
        """
        with self._lock:
            header = self._headers.get(file)
            if header is None:
                path = join(self._directory, file)
                sealed = None if self._seal is None else self._seal.file(file, path)
                try:
                    header = self._headers[file] = read_header(self._storage, path, sealed, digests=self._digests)
                except DataFileError as error:
                    if self._fix == _RESTORE:
                        raise
                    raise DataFileError(
                        error.what,
                        file=error.file,
                        tensor=error.tensor,
                        field=error.field,
                        found=error.found,
                        expected=error.expected,
                        fix=self._fix,
                    ) from error
            return header

    def entry(self, place: Place, dtype: DType, shape: tuple[int, ...]) -> TensorEntry:
        """The tensor of a place, held against what metadata promises.

        Args:
            place: where it is to be.
            dtype: the promised element type.
            shape: the promised shape.

        Raises:
            DataFileError: the file is missing or damaged, or doesn't hold what was promised.
        """
        entry = self.get(place.file).entries.get(place.name)
        if entry is not None and entry.shape == shape and entry.dtype == dtype:
            return entry
        raise self.broken_promise(place.file, place.name, dtype, shape)

    def broken_promise(self, file: str, name: str, dtype: DType, shape: tuple[int, ...]) -> DataFileError:
        """The error for a tensor that a file doesn't hold as metadata promises."""
        entry = self.get(file).entries.get(name)
        path = join(self._directory, file)
        if entry is None:
            return DataFileError("the metadata promises a tensor that the file doesn't hold", file=path, tensor=name, fix=self._fix)
        return DataFileError(
            "a tensor in a file is not what the metadata promises",
            file=path,
            tensor=name,
            found=f"{entry.dtype} of shape {list(entry.shape)}",
            expected=f"{dtype} of shape {list(shape)}",
            fix=self._fix,
        )
