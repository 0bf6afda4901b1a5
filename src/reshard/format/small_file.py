"""Read files that are held in memory whole, but not whatever size a damaged or hostile checkpoint gives them."""

from __future__ import annotations

from reshard.errors import DamagedCheckpointError
from reshard.format.digest import Hasher
from reshard.storage import Storage

# What is hashed at a time: it stays in a core's own cache.
_PIECE_BYTES = 1 << 18


def read_small(storage: Storage, path: str, most: int, *, error: type[DamagedCheckpointError]) -> bytes:
    """The bytes of a file, seen to be of a possible size before they are read: a sparse file costs nobody a disk, but its reader memory.

    Args:
        storage: where it lies.
        path: the file.
        most: the bytes that such a file has at most.
        error: what a larger one is.

    Raises:
        DamagedCheckpointError: of the given kind: it is larger.
        StorageError: the storage refuses, or there is no such file.
    """
    _check_size(storage, path, most, error)
    return storage.read_bytes(path)


def digest_small(storage: Storage, path: str, most: int, *, error: type[DamagedCheckpointError]) -> tuple[int, bytes]:
    """How many bytes such a file has, and their digest. Where nothing else is asked of it, this costs a quarter of `read_small`.

    The arguments are those of `read_small`.

    Raises:
        DamagedCheckpointError: as `read_small`.
        StorageError: likewise.
    """
    _check_size(storage, path, most, error)
    hasher = Hasher()
    with storage.open_read(path) as file:
        buffer = memoryview(bytearray(min(file.size, _PIECE_BYTES)))
        for begin in range(0, file.size, _PIECE_BYTES):
            piece = buffer[: file.size - begin]
            file.read_into(begin, piece)
            hasher.update(piece)
        return file.size, hasher.digest()


def _check_size(storage: Storage, path: str, most: int, error: type[DamagedCheckpointError]) -> None:
    entry = storage.stat(path)
    if entry is not None and entry.size > most:
        raise error(
            "a file is larger than any of its kind", file=path, found=f"{entry.size} bytes", expected=f"at most {most}", fix="it is damaged"
        )
