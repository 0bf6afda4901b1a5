"""The header of a safetensors file.

A file is 8 bytes (the length of the header's text, little-endian), the text (JSON, padded with spaces to a multiple of 8), and the tensors'
bytes without gaps. Source: the documentation and the reference implementation of huggingface/safetensors.

What this project adds lies in the free text of the header: the digests of all row blocks (`format.row_blocks`) of all tensors, one after
the other, in the order in which the header names the tensors, which is the order of their bytes. Their length is known before them, and so
is where the data begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from reshard.geometry import DType

# The limit of the reference implementation: it refuses to read a longer text.
MAX_TEXT_BYTES = 100_000_000

METADATA = "__metadata__"
DAMAGED = "the file is damaged: restore it from a copy, or resume from another iteration"


class TensorEntry(NamedTuple):
    """A tensor in a file.

    Attributes:
        name: its name in the header.
        dtype: its element type.
        shape: its shape.
        begin: where its bytes begin, from the start of the file.
        end: where they end, exclusive.
        digests: of the row blocks of these bytes, one after the other, as the header says; empty when it doesn't.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int
    digests: bytes = b""


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        entries: the tensors by name, in the order of their bytes.
        metadata: free text by key; without the digests.
        nbytes: the bytes in front of the data: the length field and the padded text.
        file_size: the bytes of the whole file.
        digest: of the bytes in front of the data.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0
    file_size: int = 0
    digest: bytes = b""
