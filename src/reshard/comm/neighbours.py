"""Ranks of one machine that write into each other's memory: one copy by the kernel, and nobody has to be ready for it.

`process_vm_writev` (Linux) writes where the other process says that its memory is. So that it never writes into memory that a rank has
taken back, every write holds the rank's door open, and a rank that leaves closes its door first.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import select
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import cache
from typing import IO, Literal, NamedTuple

import msgspec
import numpy as np

from reshard.errors import CommunicationError, ReshardError

# Pieces of memory that the system takes in one call, on either side (IOV_MAX).
MOST_PIECES = 1024

_ONE_PIECE = ctypes.c_int64 * 2

# By it a neighbour sees that it has found the process and the memory that were meant.
_TOKEN_BYTES = 16

# What is written at a time takes milliseconds. Who still seems to write after this has been ended in the middle of it, with a child of its
# process holding on to the door; or has been stopped there, and writes when it goes on.
_LONGEST_WRITE_S = 60.0

# A process that ends loses its memory first, and only then is known to have ended.
_ENDING_MS = 5_000

# How often a rank that leaves looks whether it may.
_LOOK_S = 0.001


class Pieces(NamedTuple):
    """Pieces of memory, as the system takes them.

    Attributes:
        address: where their list lies: where each begins, and its bytes, in int64.
        number: of pieces.
        held: what keeps the list alive.
    """

    address: int
    number: int
    held: object

    @classmethod
    def of(cls, listed: np.ndarray, begin: int = 0) -> Pieces:
        """Pieces by a list, (pieces, 2) of int64, in which their places are counted from an address."""
        moved = listed.copy()
        moved[:, 0] += begin
        return cls(moved.ctypes.data, len(moved), moved)


class Notice(msgspec.Struct, array_like=True, frozen=True):
    """Where a rank's door is, to be told to other ranks.

    Attributes:
        host: the machine, and what of it the process can see.
        process: its number there.
        descriptor: the number of the file that is its door.
        address: where its token lies in memory.
        token: what lies there, and at the begin of the file.
        nbytes: what it tells its neighbours, in bytes: the rest of the file.
    """

    host: str
    process: int
    descriptor: int
    address: int
    token: bytes
    nbytes: int


class Door:
    """This rank's: its neighbours may write into its memory until it closes.

    Args:
        told: what the neighbours need to know.

    Attributes:
        notice: what they find it by.
    """

    def __init__(self, host: str, told: bytes) -> None:
        token = secrets.token_bytes(_TOKEN_BYTES)
        self._token = ctypes.create_string_buffer(token, _TOKEN_BYTES)
        with ExitStack() as opened:
            self._file = opened.enter_context(os.fdopen(os.memfd_create("reshard-door", os.MFD_CLOEXEC), "r+b", buffering=0))
            for data in (token, told):
                if self._file.write(data) != len(data):  # memory is short
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            opened.pop_all()
        self.notice = Notice(host, os.getpid(), self._file.fileno(), ctypes.addressof(self._token), token, len(told))

    @classmethod
    def open(cls, told: bytes) -> Door | None:
        """A door; None where there is no such thing, or no memory for it."""
        host = find_host("pid")
        if host is None or not hasattr(os, "memfd_create") or _calls() is None:
            return None
        try:
            return cls(host, told)
        except OSError:
            return None

    def close(self) -> None:
        """Nobody writes any more, and nobody will. Waits for a write that is under way."""
        if self._file.closed:
            return
        try:
            self._shut()
        except KeyboardInterrupt:
            self._shut()  # all the same: whoever writes doesn't hear of it
            raise
        finally:
            self._file.close()

    def __del__(self) -> None:
        # The last resort, for whoever was interrupted on the way to `close`.
        with suppress(Exception):
            self.close()

    def _shut(self) -> None:
        # Who has the file open sees it, also when this end is gone; and who doesn't see it yet is waited for.
        self._file.truncate(0)
        latest = time.monotonic() + _LONGEST_WRITE_S
        while _is_held(self._file) and time.monotonic() < latest:
            time.sleep(_LOOK_S)


class Neighbour:
    """Another rank of this machine, whose door has been found.

    Args:
        rank: which.
        notice: its notice.
        own: the rank that writes, for what goes wrong.

    Attributes:
        told: what it tells its neighbours.

    Raises:
        OSError: it can't be reached.
    """

    def __init__(self, rank: int, notice: Notice, own: int) -> None:
        self.rank = rank
        self._own = own
        self._process = notice.process
        # The door is held open by the file, whichever thread asks: one must not let it fall shut under another.
        self._turn = threading.Lock()
        calls = _calls()
        if calls is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._write = calls.process_vm_writev
        with ExitStack() as opened:
            # First the process, then what tells that it is the right one.
            self._alive = os.pidfd_open(notice.process)
            opened.callback(os.close, self._alive)
            self._ends = select.poll()
            self._ends.register(self._alive, select.POLLIN)
            self._file = opened.enter_context(open(f"/proc/{notice.process}/fd/{notice.descriptor}", "rb", buffering=0))
            # Held from here on, since it may leave, and others may get its memory.
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            try:
                content = self._file.read()
                if content[:_TOKEN_BYTES] != notice.token or len(content) != _TOKEN_BYTES + notice.nbytes:
                    raise OSError(errno.ESRCH, "another process has its number, or it has left")
                token = ctypes.create_string_buffer(_TOKEN_BYTES)
                places = (ctypes.addressof(token), notice.address)
                here, there = (Pieces.of(np.array([(place, _TOKEN_BYTES)], np.int64)) for place in places)
                # The same bytes back to the same place: systems may let read but not write.
                for call in (calls.process_vm_readv, calls.process_vm_writev):
                    moved = call(notice.process, here.address, 1, there.address, 1, 0)
                    if moved != _TOKEN_BYTES:
                        raise _problem(moved)
                    if token.raw != notice.token:
                        raise OSError(errno.ESRCH, "another process has its number")
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self.told = content[_TOKEN_BYTES:]
            self._descriptor = self._file.fileno()
            # The lists of a copy of one run.
            self._here, self._there = _ONE_PIECE(), _ONE_PIECE()
            self._here_at, self._there_at = ctypes.addressof(self._here), ctypes.addressof(self._there)
            self._opened = opened.pop_all()

    def write(self, here: Pieces, there: Pieces, nbytes: int) -> None:
        """Copy memory of this process into the neighbour's; of several threads one after the other.

        Args:
            here: of this process; at most `MOST_PIECES`.
            there: of the neighbour; likewise.
            nbytes: of either together, less than 2 GiB.

        Raises:
            CommunicationError: the neighbour has gone.
            ReshardError: it is there, but its memory can't be written.
        """
        with self._turn:
            problem = self._copy(here.address, here.number, there.address, there.number, nbytes)
        if problem is not None:
            raise self._explained(problem)

    def write_run(self, here: int, there: int, nbytes: int) -> None:
        """The same of one run from an address of this process to one of the neighbour's: most are, and numpy takes longer for one piece
        than the system for a copy of some KiB.
        """
        with self._turn:
            self._here[:], self._there[:] = (here, nbytes), (there, nbytes)
            problem = self._copy(self._here_at, 1, self._there_at, 1, nbytes)
        if problem is not None:
            raise self._explained(problem)

    def _copy(self, here: int, pieces: int, there: int, places: int, nbytes: int) -> OSError | None:
        """One call, while the door is held open. Why it moved less, if it did; what is raised otherwise tells that nothing was moved."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._gone("it has left the load") from None
        except OSError as error:
            raise self._failed(error) from error
        # While this is held the rank can't leave.
        try:
            # Its size, as the place of its end: for `fstat` an object is made of all there is to know of a file.
            if os.lseek(self._descriptor, 0, os.SEEK_END) == 0:
                raise self._gone("it has left the load")
            if self._ends.poll(0):  # another may have its number
                raise self._gone("its process has ended")
            moved = self._write(self._process, here, pieces, there, places, 0)
            return None if moved == nbytes else _problem(moved)
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _explained(self, problem: OSError) -> ReshardError:
        # Asked by an object of its own: others use the common one meanwhile, and no two may at once.
        ends = select.poll()
        ends.register(self._alive, select.POLLIN)
        return self._gone("its process has ended") if ends.poll(_ENDING_MS) else self._failed(problem)

    def close(self) -> None:
        """Let go of it."""
        with self._turn:
            self._descriptor = -1  # whoever comes too late must not meet another file of this number
            self._opened.close()

    def _gone(self, found: str) -> CommunicationError:
        return CommunicationError(
            "a rank of this machine can't be handed what was read for it",
            rank=self._own,
            found=f"rank {self.rank}: {found}",
            fix="look at the rank that failed first",
        )

    def _failed(self, problem: OSError) -> ReshardError:
        return ReshardError(
            "a rank of this machine can't be handed what was read for it",
            rank=self._own,
            found=f"rank {self.rank}: its memory can't be written: {problem}",
            fix="load with neighbours=False, so that every rank reads for itself",
        )


def _is_held(file: IO[bytes]) -> bool:
    """Whether a neighbour is writing."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # without locks nobody writes: each tries one first
        return False
    return False


def are_writable(places: Sequence[tuple[int, int]]) -> bool:
    """Whether the system lets memory of this process be written as a neighbour would: not so for memory of devices, and for such as is
    only to be read.

    Args:
        places: begin and bytes of each, more than none; nobody else may write there meanwhile, since the first and last byte of each are
            written as they are.
    """
    calls = _calls()
    if calls is None:
        return False
    ends = np.array([(place, 1) for begin, nbytes in places for place in (begin, begin + nbytes - 1)], np.int64).reshape(-1, 2)
    kept = np.zeros(len(ends), np.uint8)
    for first in range(0, len(ends), MOST_PIECES):
        there = Pieces.of(ends[first : first + MOST_PIECES])
        here = Pieces.of(np.array([(first, there.number)], np.int64), kept.ctypes.data)
        for call in (calls.process_vm_readv, calls.process_vm_writev):
            if call(os.getpid(), here.address, 1, there.address, there.number, 0) != there.number:
                return False
    return True


def _problem(moved: int) -> OSError:
    """Why a call moved fewer bytes than asked for. One that stops in the middle has met memory that isn't there."""
    code = ctypes.get_errno() if moved < 0 else errno.EFAULT
    return OSError(code, os.strerror(code))


@cache
def _calls() -> ctypes.CDLL | None:
    """The system's calls; None where it hasn't them."""
    try:
        calls = ctypes.CDLL(None, use_errno=True)
        for call in (calls.process_vm_readv, calls.process_vm_writev):
            call.restype = ctypes.c_ssize_t
            call.argtypes = [ctypes.c_int, *[ctypes.c_void_p, ctypes.c_ulong] * 2, ctypes.c_ulong]
    except (OSError, AttributeError, TypeError):
        return None
    return calls if hasattr(os, "pidfd_open") and ctypes.sizeof(ctypes.c_void_p) == 8 else None  # as `Pieces` has it


def find_host(seen: Literal["pid", "net"]) -> str | None:
    """This machine since it was started, and what of it the process can see: its processes, or its network; None where nothing tells."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink(f'/proc/self/ns/{seen}')}"
    return None
