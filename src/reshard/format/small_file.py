"""Read files that are held in memory whole, but not whatever size a damaged or hostile checkpoint gives them."""

from __future__ import annotations

from reshard.errors import DamagedCheckpointError
from reshard.storage import Storage


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
    entry = storage.stat(path)
    if entry is not None and entry.size > most:
        raise error(
            "a file is larger than any of its kind", file=path, found=f"{entry.size} bytes", expected=f"at most {most}", fix="it is damaged"
        )
    return storage.read_bytes(path)
