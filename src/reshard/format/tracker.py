"""`latest_checkpointed_iteration.txt`: the iteration to resume from, as a decimal number."""

from __future__ import annotations

from reshard.errors import TrackerError
from reshard.format.names import MAX_STEP_DIGITS

_FIX = "write into it the number of an iteration that exists beside it (for example 100 for iteration_00000100), or remove it"


def encode_tracker(step: int) -> bytes:
    """The file's bytes: ASCII digits, no newline."""
    return b"%d" % step


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
