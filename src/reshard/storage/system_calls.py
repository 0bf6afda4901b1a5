"""Calls of the system that Python has no function for, or only a number."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
from collections.abc import Callable
from functools import cache

import numpy as np

# <linux/fs.h>
_AT_FDCWD = -100
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

PIECES = np.dtype(np.int64)
"""The type of the addresses and sizes of pieces of memory."""

# What kernels and file systems answer when they don't know an operation.
UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})


@cache
def _renameat2() -> Callable[[bytes, bytes, int], int] | None:
    """The C library's `renameat2`: 0, or the error number; None where there is none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    function.restype = ctypes.c_int

    def call(source: bytes, target: bytes, flags: int) -> int:
        ctypes.set_errno(0)
        return 0 if function(_AT_FDCWD, source, _AT_FDCWD, target, flags) == 0 else ctypes.get_errno()

    return call


def rename2(source: str, target: str, flags: int) -> bool:
    """Rename with flags; False where that isn't possible. Raises OSError for every other failure."""
    call = _renameat2()
    if call is None:
        return False
    code = call(os.fsencode(source), os.fsencode(target), flags)
    if code in UNSUPPORTED:
        return False
    if code:
        raise OSError(code, os.strerror(code))
    return True


@cache
def preadv() -> Callable[[int, np.ndarray, int], int] | None:
    """The C library's `preadv` for pieces of memory by address: how many bytes it read. None where there is none that is known to fit.

    `os.preadv` takes an object per piece, which for small tensors costs more than to read them. An `iovec` is an address and a size, each
    as wide as an address; the offset is as wide as the call's name says.
    """
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "preadv64", None)
    if function is None or ctypes.sizeof(ctypes.c_void_p) != PIECES.itemsize:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    function.restype = ctypes.c_ssize_t

    def call(descriptor: int, pieces: np.ndarray, offset: int) -> int:
        pieces = np.ascontiguousarray(pieces, PIECES)
        # Not by `pieces.ctypes`, which takes longer than some reads.
        done = function(descriptor, ctypes.byref(ctypes.c_int64.from_buffer(pieces)), len(pieces), offset)
        if done < 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
            return call(descriptor, pieces, offset)
        return done

    return call


def lease(descriptor: int) -> bool:
    """Take a read lease on an open file: who opens it for writing or cuts it short waits until it is closed.

    Returns:
        Whether it could be had. Not where somebody has the file open for writing, where it is somebody else's (and this process has no
        right to lease it), on most network file systems, and on other systems than Linux.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        # What says that somebody waits: by default SIGIO, of which a process dies that doesn't expect it. Of this one it takes no notice.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    return True


def is_leased(descriptor: int) -> bool:
    """Whether a lease is held and nobody waits for its end."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK
    except OSError:
        return False
