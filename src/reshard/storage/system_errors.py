"""What the operating system says, as errors of the tree."""

from __future__ import annotations

import errno
from types import TracebackType

from reshard.errors import NoSpaceError, ReshardError, StorageError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FIXES = {
    errno.EACCES: "give the user that runs this the right to read and write there, or choose another directory",
    errno.EPERM: "give the user that runs this the right to read and write there, or choose another directory",
    errno.EROFS: "the file system is mounted read-only: choose another directory",
    errno.EIO: "the device reports an input/output error: look at the system's log",
    errno.ESTALE: "the network file system lost the file: look at the server, then try again",
    errno.ENOSPC: "free some space there, or choose another directory",
    errno.EDQUOT: "the quota is used up: free some space there, or choose another directory",
}


def storage_error(error: OSError, what: str, path: str) -> ReshardError:
    """What the operating system said, as an error of the tree.

    Args:
        error: its words.
        what: what was tried, without the path ("can't create the file").
        path: what it was tried on.
    """
    kind = NoSpaceError if error.errno in _FULL else StorageError
    fix = _FIXES.get(error.errno) if error.errno is not None else None
    return kind(what, file=path, found=error.strerror or str(error), fix=fix)


class Saying:
    """Errors of the system become errors of the storage. Around each read, for which a generator would cost more than the read may."""

    __slots__ = ("_path", "_what")

    def __init__(self, what: str, path: str) -> None:
        self._what, self._path = what, path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError):
            raise storage_error(error, self._what, self._path) from error
