"""Read JSON that nobody vouches for: typed, with errors that name the file, and without silent loss of duplicate keys."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec
import numpy as np

from reshard.errors import DamagedCheckpointError, MetadataError

T = TypeVar("T")

# What is looked at a time.
_PART = 32 << 10


def decode(data: bytes, decoder: msgspec.json.Decoder[T], file: str, *, error: type[DamagedCheckpointError] = MetadataError) -> T:
    """The value of JSON bytes, of the decoder's type.

    Raises:
        DamagedCheckpointError: of the given kind: not UTF-8, not JSON, or not of the type.
    """
    check_utf8(data, file, error=error)
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as cause:
        raise error("JSON with an unexpected value", file=file, found=str(cause), fix="the file is damaged or of another format") from cause
    except msgspec.DecodeError as cause:
        raise error(
            "not JSON", file=file, found=f"{cause}; {len(data)} bytes that begin with {data[:20]!r}", fix="the file is damaged"
        ) from cause
    except RecursionError as cause:
        raise error("JSON that is nested too deeply", file=file, fix="the file is damaged or of another format") from cause


def check_utf8(data: bytes, file: str, *, error: type[DamagedCheckpointError] = MetadataError) -> None:
    """See that bytes are UTF-8 without a byte-order mark.

    Raises:
        DamagedCheckpointError: of the given kind.
    """
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise error(
            "JSON begins with a byte-order mark",
            file=file,
            found=repr(data[:4]),
            expected="UTF-8 without one",
            fix="save the file as plain UTF-8",
        )
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as cause:
            raise error("JSON that is not UTF-8", file=file, found=str(cause), fix="the file is damaged") from cause


def _colons(data: bytes | memoryview) -> int:
    # `bytes.count` takes five times as long. In parts, since for a long text memory would come anew from the system, page by page.
    listed = np.frombuffer(data, np.uint8)
    return sum(int(np.count_nonzero(listed[first : first + _PART] == ord(":"))) for first in range(0, len(listed), _PART))


def check_duplicate_keys(
    data: bytes | memoryview, colons: int | None, file: str, *, error: type[DamagedCheckpointError] = MetadataError
) -> None:
    """See that no object has a key twice: decoders silently keep the last one.

    Every key has a colon of its own, so text with no more colons than the decoded value has keys has no key twice. Only text with more of
    them (in names, or for unknown keys) is parsed again to be sure.

    Args:
        data: JSON that was decoded before.
        colons: a lower bound for the number of keys in it: those that the decoded value has. None looks at every key.
        file: for the error.
        error: its kind.

    Raises:
        DamagedCheckpointError: of the given kind, naming the key.
    """
    if colons is not None and _colons(data) == colons:
        return

    def pairs(items: list[tuple[str, Any]]) -> None:
        seen = set()
        for key, _ in items:
            if key in seen:
                raise error("JSON with the same key twice in one object", file=file, found=repr(key[:200]), fix="the file is damaged")
            seen.add(key)

    try:
        json.loads(bytes(data), object_pairs_hook=pairs)
    except RecursionError as cause:
        raise error("JSON that is nested too deeply", file=file, fix="the file is damaged or of another format") from cause
    except ValueError as cause:
        raise error("not JSON", file=file, found=str(cause), fix="the file is damaged") from cause
