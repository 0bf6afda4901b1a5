"""`latest_checkpointed_iteration.txt`: the iteration to resume from, as a decimal number."""

from __future__ import annotations

from reshard.errors import TrackerError
from reshard.format.names import MAX_STEP_DIGITS
from reshard.format.small_file import read_small
from reshard.storage import Storage

# A number, and as many spaces and empty lines around it as an editor may leave.
_MOST_BYTES = 512

_FIX = "write into it the number of an iteration that exists beside it (for example 100 for iteration_00000100), or remove it"


def encode_tracker(step: int) -> bytes:
    """The file's bytes: ASCII digits, no newline."""
    return b"%d" % step


def read_tracker(storage: Storage, path: str) -> int:
    """The iteration that a tracker names.

    Raises:
        TrackerError: it is empty, not a number, or too large for one.
        StorageError: the storage refuses.
    """
    return decode_tracker(read_small(storage, path, _MOST_BYTES, error=TrackerError), path)


def read_text(storage: Storage, path: str) -> bytes | None:
    """What stands in a tracker, a number or not; None when there is none.

    Raises:
        TrackerError: it is too large for one.
        StorageError: the storage refuses.
    """
    return None if storage.stat(path) is None else read_small(storage, path, _MOST_BYTES, error=TrackerError)


def decode_tracker(data: bytes, file: str) -> int:
    """The iteration that the file names.

    Raises:
        TrackerError: it is empty or not a number.
    """
    text = data.strip()
    if not text:
        raise TrackerError(
            "the tracker is empty", file=file, found=f"{len(data)} bytes without a digit", expected="the number of an iteration", fix=_FIX
        )
    if not text.isdigit() or len(text) > MAX_STEP_DIGITS:
        raise TrackerError("the tracker holds no iteration number", file=file, found=repr(text[:40]), expected="decimal digits", fix=_FIX)
    return int(text)
