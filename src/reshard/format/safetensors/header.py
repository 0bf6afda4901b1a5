"""The header of a safetensors file.

A file is 8 bytes (the length of the header's text, little-endian), the text (JSON, padded with spaces to a multiple of 8), and the tensors'
bytes without gaps. Source: the documentation and the reference implementation of huggingface/safetensors.

What this project adds lies in the free text of the header: the digests of all row blocks (`format.row_blocks`) of all tensors, one after
the other, in the order in which the header names the tensors, which is the order of their bytes. Their length is known before them, and so
is where the data begins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from math import prod
from typing import NamedTuple

from reshard.errors import CaptureError
from reshard.format.digest import DIGEST_DIGITS, DIGEST_NAME
from reshard.format.row_blocks import LEAST_BYTES, row_blocks_of
from reshard.geometry import DType

# The limit of the reference implementation: it refuses to read a longer text.
MAX_TEXT_BYTES = 100_000_000

# The reference implementation lays tensors out in this order of their types, so that each is aligned; and then by name. Here they stay in
# the order in which they are given, which is the state's and mostly that of its memory: to go through memory from its beginning to its end
# takes a fifth less time than to jump from layer 1 to layer 10.
_DTYPE_ORDER = ("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
_RANK = {code: rank for rank, code in enumerate(_DTYPE_ORDER)}

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


@dataclass(frozen=True)
class PlannedHeader:
    """The header of a file that is to be written.

    Attributes:
        entries: the tensors by name, in the order of their bytes.
        nbytes: the bytes in front of the data: the length field and the padded text.
        file_size: the bytes of the whole file.
        blank: the bytes in front of the data, with zeros in the place of every digit of a digest.
        digests_at: where the digests begin in them; None for a file without.
        digests: how many there are.
    """

    entries: Mapping[str, TensorEntry]
    nbytes: int
    file_size: int
    blank: bytes
    digests_at: int | None
    digests: int

    def encode(self, digests: Sequence[bytes]) -> bytes:
        """The bytes in front of the data.

        Args:
            digests: of every row block of every tensor, in order; none for a file without.
        """
        at = self.digests_at
        if at is None:
            return self.blank
        digits = b"".join(digests).hex().encode()
        assert len(digits) == self.digests * DIGEST_DIGITS
        return self.blank[:at] + digits + self.blank[at + len(digits) :]


def plan_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str], *, digests: bool = True
) -> PlannedHeader:
    """The header of a file with these tensors: wider types first, and those of one width in the order in which they are given.

    Args:
        tensors: name, element type and shape of each.
        metadata: free text by key.
        digests: whether it has the digests of their row blocks.

    Raises:
        CaptureError: two tensors of one name, a name that can't be written, or more tensors than a header can hold.
    """
    ordered = sorted(tensors, key=lambda tensor: _RANK[tensor[1].safetensors])
    # Many tensors are alike.
    known: dict[tuple[str, tuple[int, ...]], _Kin] = {}
    kin: list[_Kin] = []
    items: list[str] = []
    position = number = 0
    for name, dtype, shape in ordered:
        alike = known.get((dtype.name, shape))
        if alike is None:
            alike = known[dtype.name, shape] = _Kin.of(dtype, shape)
        kin.append(alike)
        number += alike.blocks
        end = position + alike.nbytes
        items.append(f"{encode_basestring(name)}{alike.text}{position},{end}]}}")
        position = end
    names = {name for name, _, _ in ordered}
    if len(names) != len(ordered) or METADATA in names:
        raise CaptureError(
            "a file can't hold two tensors of one name, nor one named __metadata__", found=_repeated([t[0] for t in ordered]) or METADATA
        )
    text = _text(items, {**metadata, DIGEST_NAME: "0" * (DIGEST_DIGITS * number)} if digests else metadata)
    nbytes = 8 + len(text)
    if nbytes > MAX_TEXT_BYTES:
        raise CaptureError(
            "more tensors than the header of one safetensors file can hold",
            found=f"{len(ordered)} tensors, a header of {nbytes} bytes",
            expected=f"at most {MAX_TEXT_BYTES} bytes",
            fix="save from more ranks, or stack small tensors",
        )
    entries: dict[str, TensorEntry] = {}
    begin = nbytes
    for (name, dtype, _), alike in zip(ordered, kin, strict=True):
        end = begin + alike.nbytes
        entries[name] = TensorEntry(name, dtype, alike.shape, begin, end)
        begin = end
    blank = len(text).to_bytes(8, "little") + text
    # Found at the first place that can be the key's: the metadata comes first, and in text before it every quote is escaped.
    at = blank.index(f'"{DIGEST_NAME}":"'.encode()) + len(DIGEST_NAME) + 4 if digests else None
    return PlannedHeader(entries, nbytes, nbytes + position, blank, at, number if digests else 0)


class _Kin(NamedTuple):
    """What tensors of one type and shape have in common: their bytes, how many row blocks, and the text between name and place."""

    shape: tuple[int, ...]
    nbytes: int
    blocks: int
    text: str

    @classmethod
    def of(cls, dtype: DType, shape: tuple[int, ...]) -> _Kin:
        nbytes = dtype.itemsize * prod(shape)
        blocks = 1 if nbytes <= LEAST_BYTES else row_blocks_of(shape, dtype.itemsize).number
        extents = ",".join(map(str, shape))
        return cls(tuple(shape), nbytes, blocks, f':{{"dtype":"{dtype.safetensors}","shape":[{extents}],"data_offsets":[')


def _text(items: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    """The padded text: of the tensors' entries, whose places are counted from the begin of the data."""
    parts = [f'"{METADATA}":{json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":"))}'] if metadata else []
    parts += items
    try:
        text = ("{" + ",".join(parts) + "}").encode()
    except UnicodeEncodeError as cause:
        raise CaptureError(
            "a name that is no Unicode text can't be written", found=ascii(cause.object[cause.start : cause.end]), fix="rename the tensor"
        ) from cause
    return text + b" " * (-len(text) % 8)


def _repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
