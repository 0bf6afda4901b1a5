"""Read the header of a safetensors file."""

from __future__ import annotations

from reshard.errors import DataFileError
from reshard.format.safetensors.header import DAMAGED, MAX_TEXT_BYTES, Header
from reshard.format.safetensors.parsing import parse_header
from reshard.format.seal import SealedFile
from reshard.storage import ReadableFile, Storage


def read_header(storage: Storage, path: str, sealed: SealedFile | None = None, *, digests: bool = True) -> Header:
    """The header of a file, every size and offset checked against the file's size.

    Args:
        storage: where it lies.
        path: the file.
        sealed: what the checkpoint's seal says of it: then it is that file, or an error.
        digests: as in `parse_header`.

    Raises:
        DataFileError: the file is missing, truncated, not the one that was sealed, or its header can't be trusted.
        StorageError: the storage refuses to read it.
    """
    found = storage.stat(path)
    if found is None or found.is_directory:
        raise DataFileError("a data file is missing", file=path, fix="restore it from a copy, or resume from another iteration")
    with storage.open_read(path) as file:
        if sealed is not None:
            sealed.check_size(file.size, path)
        start = read_start(file, path)
        if sealed is not None:
            sealed.check(start, path)
        return parse_header(start, file.size, path, digests=digests)


def read_start(file: ReadableFile, path: str) -> bytearray:
    """The bytes in front of the data, as many as a file that nobody vouches for says: for `parse_header`.

    Raises:
        DataFileError: it has not so many, or says that a header can't have.
        StorageError: the storage refuses to read it.
    """
    size = file.size
    if size < 8:
        raise DataFileError(
            "the file is truncated", file=path, found=f"{size} bytes", expected="at least 8 for the header's length", fix=DAMAGED
        )
    length = bytearray(8)
    file.read_into(0, memoryview(length))
    promised = int.from_bytes(length, "little")
    if promised == 0:
        raise DataFileError("the file was never finished: its header, written last, is still zero", file=path, fix=DAMAGED)
    if promised > MAX_TEXT_BYTES:
        raise DataFileError(
            "not a safetensors file, or a damaged one",
            file=path,
            found=f"a header of {promised} bytes",
            expected=f"at most {MAX_TEXT_BYTES}",
            fix=DAMAGED,
        )
    if promised > size - 8:
        raise DataFileError(
            "the file is truncated inside its header",
            file=path,
            found=f"{size} bytes",
            expected=f"a header of {promised + 8} bytes, then data",
            fix=DAMAGED,
        )
    start = bytearray(8 + promised)
    file.read_into(0, memoryview(start))
    return start
