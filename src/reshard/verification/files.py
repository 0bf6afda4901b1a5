"""Read one file of a checkpoint whole, and hold it against its seal and its digests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from reshard.errors import DamagedCheckpointError, ReshardError, StorageError
from reshard.format.digest import Hasher
from reshard.format.safetensors import BlockCheck, Header, TensorEntry, parse_header, read_start
from reshard.format.seal import SealedFile
from reshard.storage import ReadableFile, Storage
from reshard.storage.storage import join
from reshard.verification.faults import Fault

# What is held at a time. Large enough for any storage, small enough that it is still in a cache when it is hashed.
_PIECE_BYTES = 4 << 20


class FileCheck:
    """One file, and what became of it.

    Args:
        storage: where the checkpoint lies.
        directory: of the checkpoint.
        name: the path of the file inside it.
        sealed: what the seal says of the file; None when it says nothing.
        advance: is told of bytes that are done; all of the file's in the end.

    Attributes:
        name: the path of the file inside the checkpoint's directory.
        header: of a safetensors file; None until it was read, and when it is damaged.
        nbytes: how many bytes were held against digests.
        faults: all that is wrong.
    """

    def __init__(self, storage: Storage, directory: str, name: str, sealed: SealedFile | None, advance: Callable[[int], None]) -> None:
        self.name = name
        self.header: Header | None = None
        self.nbytes = 0
        self.faults: list[Fault] = []
        self._storage = storage
        self._path = join(directory, name)
        self._sealed = sealed
        self._advance = advance

    def read_tensors(self) -> None:
        """Check a safetensors file. What can't be read or understood is a fault, never an error."""
        self._read(self._tensors)

    def read_bytes(self) -> None:
        """Check a file that the seal covers whole. What can't be read is a fault, never an error."""
        self._read(self._whole)

    def _read(self, look: Callable[[ReadableFile], None]) -> None:
        try:
            with self._storage.open_read(self._path) as file:
                if self._sealed is not None:
                    self._try(lambda sealed: sealed.check_size(file.size, self._path), self._sealed)
                look(file)
        except (DamagedCheckpointError, StorageError) as error:
            self._add(error)

    def _add(self, error: ReshardError, tensor: str | None = None) -> None:
        fault = Fault.of(self.name, error)
        self.faults.append(fault if tensor is None else Fault(fault.file, fault.what, tensor, fault.found, fault.expected))

    def _try(self, check: Callable[[SealedFile], None], sealed: SealedFile) -> bool:
        try:
            check(sealed)
        except DamagedCheckpointError as error:
            self._add(error)
            return False
        return True

    def _whole(self, file: ReadableFile) -> None:
        sealed = self._sealed
        if sealed is None or sealed.size != file.size:
            self._advance(file.size)
            return
        hasher = Hasher()
        for data in self._pieces(file, 0, file.size):
            hasher.update(data)
        self._try(lambda sealed: sealed.check_digest(file.size, hasher.digest(), self._path), sealed)

    def _tensors(self, file: ReadableFile) -> None:
        sealed = self._sealed
        start = read_start(file, self._path)
        is_good = True
        if sealed is not None:
            is_good = self._try(lambda sealed: sealed.check(start, self._path), sealed)
            self.nbytes += len(start)
        self._advance(len(start))
        try:
            # Of a truncated file the header says which tensors are lost.
            header = parse_header(start, file.size if sealed is None else sealed.size, self._path)
        except DamagedCheckpointError as error:
            # A header that is not as it was saved need not make sense: once said is enough.
            if is_good:
                self._add(error)
            self._advance(file.size - len(start))
            return
        if is_good:
            self.header = header
        checked = [entry for entry in header.entries.values() if entry.digests]
        if not checked:
            self._advance(file.size - len(start))
        for entry in checked:
            if entry.end > file.size:
                found, expected = f"{file.size} bytes", f"at least {entry.end} bytes"
                self.faults.append(Fault(self.name, "the file ends before the tensor does", entry.name, found, expected))
        for group in _groups([entry for entry in checked if entry.end <= file.size]):
            self._group(file, group)

    def _group(self, file: ReadableFile, entries: Sequence[TensorEntry]) -> None:
        """Check tensors that lie one after the other: one, or several that fit into a piece together."""
        begin, end = entries[0].begin, entries[-1].end
        try:
            if len(entries) == 1:
                self._one(file, entries[0])
                return
            data = memoryview(np.empty(end - begin, np.uint8))
            file.read_into(begin, data)
        except StorageError as error:
            if len(entries) == 1:
                self._add(error, entries[0].name)
                return
            # Which of them can't be read?
            for entry in entries:
                self._group(file, [entry])
            return
        self._done(len(data))
        for entry in entries:
            check = BlockCheck(entry, self._path)
            check.update(0, data[entry.begin - begin : entry.end - begin])
            self._note(check)

    def _one(self, file: ReadableFile, entry: TensorEntry) -> None:
        check = BlockCheck(entry, self._path)
        if entry.begin == entry.end:
            check.update(0, memoryview(b""))
        offset = 0
        for data in self._pieces(file, entry.begin, entry.end):
            check.update(offset, data)
            offset += len(data)
        self._note(check)

    def _note(self, check: BlockCheck) -> None:
        """One fault for a tensor, however many of its blocks are wrong."""
        if check.wrong:
            self._add(check.error())

    def _pieces(self, file: ReadableFile, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes of a range, in pieces that are valid until the next one."""
        piece = memoryview(np.empty(min(_PIECE_BYTES, end - begin), np.uint8))
        while begin < end:
            data = piece[: end - begin]
            file.read_into(begin, data)
            yield data
            self._done(len(data))
            begin += len(data)

    def _done(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self._advance(nbytes)


def _groups(entries: Sequence[TensorEntry]) -> Iterator[list[TensorEntry]]:
    """Tensors in the order of their bytes, as many together as a piece holds."""
    group: list[TensorEntry] = []
    for entry in entries:
        if group and entry.end - group[0].begin > _PIECE_BYTES:
            yield group
            group = []
        group.append(entry)
    if group:
        yield group
