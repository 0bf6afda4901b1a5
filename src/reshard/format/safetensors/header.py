"""The header of a safetensors file.

A file is 8 bytes (the length of the header's text, little-endian), the text (JSON, padded with spaces to a multiple of 8), and the tensors'
bytes without gaps. Source: the documentation and the reference implementation of huggingface/safetensors.

What this project adds lies in the free text of the header: the digests of all row blocks (`format.row_blocks`) of all tensors, one after
the other, in the order in which the header names the tensors, which is the order of their bytes. Their length is known before them, and so
is where the data begins.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import msgspec

from reshard.errors import DataFileError, UsageError
from reshard.format import json_text
from reshard.format.digest import DIGEST_BYTES, DIGEST_NAME, digest_of, parse_digests
from reshard.format.row_blocks import row_blocks_of
from reshard.geometry import DType
from reshard.geometry.dtypes import by_safetensors

# The limit of the reference implementation: it refuses to read a longer text.
MAX_TEXT_BYTES = 100_000_000

# numpy's limits, with which every tensor of a file becomes an array: its bytes are counted in 63 bits.
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 2**60

_METADATA = "__metadata__"
_DAMAGED = "the file is damaged: restore it from a copy, or resume from another iteration"


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


class _Entry(msgspec.Struct, gc=False):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_TEXT_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY_DECODER = msgspec.json.Decoder(_Entry)
_METADATA_DECODER = msgspec.json.Decoder(dict[str, str])


def parse_header(start: bytes, file_size: int, file: str) -> Header:
    """The header that a file begins with, every size and offset checked against the file.

    Args:
        start: the bytes in front of the data: the length field and the text.
        file_size: bytes of the whole file.
        file: for errors.

    Raises:
        DataFileError: it is not a header, or doesn't fit the file: truncated, gaps, overlaps, sizes that contradict shapes.
    """
    text, nbytes = start[8:], len(start)
    if int.from_bytes(start[:8], "little") != len(text):
        raise DataFileError("the header has not the length that it says", file=file, found=f"{len(text)} bytes", fix=_DAMAGED)
    raw = json_text.decode(text, _TEXT_DECODER, file, error=DataFileError)
    metadata: dict[str, str] = {}
    colons = 4 * len(raw)
    if _METADATA in raw:
        metadata = json_text.decode(bytes(raw.pop(_METADATA)), _METADATA_DECODER, file, error=DataFileError)
        colons += len(metadata) - 3
    known: dict[tuple[str, tuple[int, ...]], _Alike] = {}
    digests = _Digests(metadata.pop(DIGEST_NAME, None), file)
    entries = [_entry(name, item, nbytes, file, known, digests) for name, item in raw.items()]
    digests.check_end(len(entries))
    json_text.check_duplicate_keys(text, colons, file, error=DataFileError)
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = nbytes
    for entry in entries:
        if entry.begin != position:
            what = "overlap" if entry.begin < position else "leave a hole"
            raise DataFileError(
                f"tensors of a file {what}",
                file=file,
                tensor=entry.name,
                found=f"begins at byte {entry.begin}",
                expected=f"byte {position}",
                fix=_DAMAGED,
            )
        position = entry.end
    if position != file_size:
        what = "the file is truncated" if position > file_size else "the file has more bytes than its header promises"
        raise DataFileError(what, file=file, found=f"{file_size} bytes", expected=f"{position} bytes, as its header promises", fix=_DAMAGED)
    return Header({entry.name: entry for entry in entries}, metadata, nbytes, file_size, digest_of(start))


class _Digests:
    """The digests of a header, of which each tensor takes its own."""

    def __init__(self, text: str | None, file: str) -> None:
        self._file = file
        self._text = text
        found = b"" if text is None else parse_digests(text)
        if found is None:
            raise self._wrong("so many times 32 hexadecimal digits")
        self._all = found
        self._taken = 0

    def take(self, number: int) -> bytes:
        """The next ones."""
        begin = self._taken
        self._taken = end = begin + number * DIGEST_BYTES
        return self._all[begin:end]

    def check_end(self, tensors: int) -> None:
        """See that there were as many as the tensors took."""
        if self._text is not None and self._taken != len(self._all):
            raise self._wrong(f"{2 * self._taken} hexadecimal digits for the row blocks of {tensors} tensors")

    def _wrong(self, expected: str) -> DataFileError:
        return DataFileError(
            "the digests in the header can't be understood",
            file=self._file,
            field=DIGEST_NAME,
            found=f"{len(self._text or '')} characters",
            expected=expected,
            fix=_DAMAGED,
        )


class _Alike(NamedTuple):
    """What tensors of one type and shape have in common: the type, their bytes, and how many row blocks they have."""

    dtype: DType
    nbytes: int
    blocks: int


def _entry(
    name: str,
    raw: msgspec.Raw,
    nbytes: int,
    file: str,
    known: dict[tuple[str, tuple[int, ...]], _Alike],
    digests: _Digests,
) -> TensorEntry:
    """One tensor's entry. `known` has what was seen before: many tensors are alike."""
    try:
        item = _ENTRY_DECODER.decode(raw)
        begin, end = item.data_offsets
        shape = tuple(item.shape)
        alike = known.get((item.dtype, shape))
        if alike is not None and begin >= 0 and end - begin == alike[1]:
            return TensorEntry(name, alike[0], shape, begin + nbytes, end + nbytes, digests.take(alike[2]))
        dtype = by_safetensors(item.dtype)
    except (msgspec.MsgspecError, RecursionError) as cause:
        raise DataFileError(
            "a tensor's entry in the header can't be understood", file=file, tensor=name, found=str(cause), fix=_DAMAGED
        ) from cause
    except UsageError as cause:
        raise DataFileError(cause.what, file=file, tensor=name, expected=cause.expected) from cause
    # An empty tensor has no bytes that would keep its other dimensions in bounds.
    too_large = len(shape) > _MAX_DIMENSIONS or (0 in shape and prod(max(extent, 1) for extent in shape) >= _MAX_ELEMENTS)
    if begin < 0 or end < begin or too_large or (shape and min(shape) < 0):
        raise DataFileError(
            "a tensor's entry in the header has impossible numbers",
            file=file,
            tensor=name,
            found=f"shape {reprlib.repr(shape)}, offsets {begin} to {end}",
            fix=_DAMAGED,
        )
    if end - begin != dtype.itemsize * prod(shape):
        raise DataFileError(
            "a tensor's bytes in the header contradict its shape",
            file=file,
            tensor=name,
            found=f"{end - begin} bytes",
            expected=f"{dtype.itemsize * prod(shape)} bytes for {dtype} of shape {shape}",
            fix=_DAMAGED,
        )
    alike = known[item.dtype, shape] = _Alike(dtype, end - begin, row_blocks_of(shape, dtype.itemsize).number)
    return TensorEntry(name, dtype, shape, begin + nbytes, end + nbytes, digests.take(alike.blocks))
