"""The digest of stored bytes: XXH3 with 128 bits, which is faster than memory and finds any damage that happens by accident.

It is no defence against somebody who changes a file and its digest. Source: https://github.com/Cyan4973/xxHash.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import xxhash

DIGEST_NAME = "xxh3_128"
"""What a digest is called in files. Another algorithm would have another name."""

DIGEST_BYTES = 16

DIGEST_DIGITS = 2 * DIGEST_BYTES
"""The lower-case hexadecimal digits of a digest, most significant first, as in files."""

_DIGITS = b"0123456789abcdef"


digest_of: Callable[[bytes | bytearray | memoryview | np.ndarray | ctypes.Array[ctypes.c_char]], bytes] = xxhash.xxh3_128_digest
"""The digest of bytes, or of an array's own (C-contiguous) memory."""


class Hasher:
    """The digest of bytes that come piece by piece. While it looks at a large piece other threads run."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()
        self.update = self._state.update

    def digest(self) -> bytes:
        """Of all pieces so far."""
        return self._state.digest()


def parse_digests(text: str) -> bytes | None:
    """The digests that a text of 32 digits for each means, one after the other; None when it can't mean any.

    Upper-case digits are none: each digest has one spelling, so that no bit of it is free.
    """
    # By `translate`: a header has some hundred thousand digits, and a pattern takes far longer to look at them.
    if len(text) % DIGEST_DIGITS or not text.isascii() or text.encode().translate(None, _DIGITS):
        return None
    return bytes.fromhex(text)
