"""The header of a safetensors file.

A file is 8 bytes (the length of the header's text, little-endian), the text (JSON, padded with spaces to a multiple of 8), and the tensors'
bytes without gaps. Source: the documentation and the reference implementation of huggingface/safetensors.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from math import prod
from typing import NamedTuple

import msgspec

from reshard.errors import CaptureError, DataFileError, UsageError
from reshard.format import json_text
from reshard.geometry import DType
from reshard.geometry.dtypes import by_safetensors

# The limit of the reference implementation: it refuses to read a longer text.
MAX_TEXT_BYTES = 100_000_000

# The reference implementation lays tensors out in this order of their types (so that each is aligned), then by name.
_DTYPE_ORDER = ("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
_RANK = {code: rank for rank, code in enumerate(_DTYPE_ORDER)}

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
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        entries: the tensors by name, in the order of their bytes.
        metadata: free text by key.
        nbytes: the bytes in front of the data: the length field and the padded text.
        file_size: the bytes of the whole file.
    """

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0
    file_size: int = 0


def plan_header(tensors: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """The header of a file with these tensors, laid out as the reference implementation does.

    Args:
        tensors: name, element type and shape of each.
        metadata: free text by key.

    Raises:
        CaptureError: two tensors of one name, a name that can't be written, or more tensors than a header can hold.
    """
    ordered = sorted(tensors, key=lambda tensor: (_RANK[tensor[1].safetensors], tensor[0]))
    relative: dict[str, TensorEntry] = {}
    position = 0
    for name, dtype, shape in ordered:
        end = position + dtype.itemsize * prod(shape)
        relative[name] = TensorEntry(name, dtype, tuple(shape), position, end)
        position = end
    if len(relative) != len(ordered) or _METADATA in relative:
        raise CaptureError(
            "a file can't hold two tensors of one name, nor one named __metadata__", found=_repeated([t[0] for t in ordered]) or _METADATA
        )
    nbytes = 8 + len(_text(relative, metadata, 0))
    if nbytes > MAX_TEXT_BYTES:
        raise CaptureError(
            "more tensors than the header of one safetensors file can hold",
            found=f"{len(ordered)} tensors, a header of {nbytes} bytes",
            expected=f"at most {MAX_TEXT_BYTES} bytes",
            fix="save from more ranks, or stack small tensors",
        )
    entries = {e.name: TensorEntry(e.name, e.dtype, e.shape, e.begin + nbytes, e.end + nbytes) for e in relative.values()}
    return Header(entries, dict(metadata), nbytes, nbytes + position)


def encode_header(header: Header) -> bytes:
    """The first `header.nbytes` bytes of the file.

    Raises:
        CaptureError: a name that can't be written, or a header whose text has not the planned length.
    """
    text = _text(header.entries, header.metadata, header.nbytes)
    if 8 + len(text) != header.nbytes:
        raise CaptureError("a header's text has not the planned length", found=f"{8 + len(text)} bytes", expected=f"{header.nbytes} bytes")
    return len(text).to_bytes(8, "little") + text


def _text(entries: Mapping[str, TensorEntry], metadata: Mapping[str, str], nbytes: int) -> bytes:
    parts = [f'"{_METADATA}":{json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":"))}'] if metadata else []
    for e in entries.values():
        shape = ",".join(map(str, e.shape))
        offsets = f"{e.begin - nbytes},{e.end - nbytes}"
        parts.append(f'{encode_basestring(e.name)}:{{"dtype":"{e.dtype.safetensors}","shape":[{shape}],"data_offsets":[{offsets}]}}')
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


class _Entry(msgspec.Struct, gc=False):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_TEXT_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY_DECODER = msgspec.json.Decoder(_Entry)
_METADATA_DECODER = msgspec.json.Decoder(dict[str, str])


def parse_header(text: bytes, file_size: int, file: str) -> Header:
    """The header that a file's text says, every size and offset checked against the file.

    Args:
        text: what follows the length field, without it.
        file_size: bytes of the whole file.
        file: for errors.

    Raises:
        DataFileError: it is not a header, or doesn't fit the file: truncated, gaps, overlaps, sizes that contradict shapes.
    """
    raw = json_text.decode(text, _TEXT_DECODER, file, error=DataFileError)
    nbytes = 8 + len(text)
    metadata: dict[str, str] = {}
    colons = 4 * len(raw)
    if _METADATA in raw:
        metadata = json_text.decode(bytes(raw.pop(_METADATA)), _METADATA_DECODER, file, error=DataFileError)
        colons += len(metadata) - 3
    known: dict[tuple[str, tuple[int, ...]], tuple[DType, int]] = {}
    entries = [_entry(name, item, nbytes, file, known) for name, item in raw.items()]
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
    return Header({entry.name: entry for entry in entries}, metadata, nbytes, file_size)


def _entry(name: str, raw: msgspec.Raw, nbytes: int, file: str, known: dict[tuple[str, tuple[int, ...]], tuple[DType, int]]) -> TensorEntry:
    """One tensor's entry. `known` has the types and sizes in bytes of what was seen before: many tensors are alike."""
    try:
        item = _ENTRY_DECODER.decode(raw)
        begin, end = item.data_offsets
        shape = tuple(item.shape)
        alike = known.get((item.dtype, shape))
        if alike is not None and begin >= 0 and end - begin == alike[1]:
            return TensorEntry(name, alike[0], shape, begin + nbytes, end + nbytes)
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
    known[item.dtype, shape] = (dtype, end - begin)
    return TensorEntry(name, dtype, shape, begin + nbytes, end + nbytes)
