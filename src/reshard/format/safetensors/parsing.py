"""What the header of a safetensors file says, every size and offset checked against the file."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from math import prod
from operator import attrgetter
from typing import NamedTuple

import msgspec
import numpy as np

from reshard.errors import DataFileError, UsageError
from reshard.format import json_text
from reshard.format.digest import DIGEST_BYTES, DIGEST_NAME, digest_of, parse_digests
from reshard.format.row_blocks import row_blocks_of
from reshard.format.safetensors.header import DAMAGED, METADATA, Header, TensorEntry
from reshard.geometry import DType
from reshard.geometry.dtypes import by_safetensors
from reshard.rows import rows

# numpy's limits, with which every tensor of a file becomes an array: its bytes are counted in 63 bits.
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 2**60


class _Entry(msgspec.Struct, gc=False):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _AnyEntry(msgspec.Struct, gc=False):
    """An entry, or the free text, which is read as if it were one.

    What an entry doesn't say is impossible: such an entry is looked at by itself, where it is an error. The count of colons, which finds
    names that come twice, relies on three of each.
    """

    dtype: str = ""
    shape: tuple[int, ...] = (-1,)
    data_offsets: tuple[int, int] = (-1, -1)


class _FreeText(msgspec.Struct):
    metadata: msgspec.Raw | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name=METADATA)


# What a header begins with whose free text comes first.
_FREE_TEXT_FIRST = f'{{"{METADATA}":{{'.encode()

_FREE_TEXT_DECODER = msgspec.json.Decoder(_FreeText)
_METADATA_DECODER = msgspec.json.Decoder(dict[str, str])
_ENTRIES_DECODER = msgspec.json.Decoder(dict[str, _AnyEntry])
_TEXT_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY_DECODER = msgspec.json.Decoder(_Entry)


def parse_header(start: bytes | bytearray, file_size: int, file: str, *, digests: bool = True) -> Header:
    """The header that a file begins with.

    Args:
        start: the bytes in front of the data: the length field and the text.
        file_size: bytes of the whole file.
        file: for errors.
        digests: whether the entries are to have theirs.

    Raises:
        DataFileError: it is not a header, or doesn't fit the file: truncated, gaps, overlaps, sizes that contradict shapes.
    """
    nbytes = len(start)
    if int.from_bytes(start[:8], "little") != nbytes - 8:
        raise DataFileError("the header has not the length that it says", file=file, found=f"{nbytes - 8} bytes", fix=DAMAGED)
    metadata, rest = _halves(start) or (_free_text(bytes(start[8:]), file), bytes(start[8:]))
    colons = 0 if metadata is None else 1 + len(metadata)
    metadata = metadata or {}
    supply = _Digests(metadata.pop(DIGEST_NAME, None), file, are_given=digests)
    at_once = _entries_at_once(rest, nbytes, file_size, supply)
    entries = at_once if at_once is not None else _entries_one_by_one(bytes(start[8:]), nbytes, file, supply)
    supply.check_end(len(entries))
    json_text.check_duplicate_keys(memoryview(start)[8:], colons + 4 * len(entries), file, error=DataFileError)
    if at_once is None:
        entries = _in_order(entries, nbytes, file_size, file)
    return Header(entries, metadata, nbytes, file_size, digest_of(start))


def _free_text(text: bytes, file: str) -> dict[str, str] | None:
    """The free text of any header; None when it has none.

    Raises:
        DataFileError: that isn't what it is, or the header is no JSON.
    """
    free = json_text.decode(text, _FREE_TEXT_DECODER, file, error=DataFileError).metadata
    return None if free is msgspec.UNSET else json_text.decode(bytes(free), _METADATA_DECODER, file, error=DataFileError)


def _halves(start: bytes | bytearray) -> tuple[dict[str, str], bytes] | None:
    """The free text of a header that begins with it, as nearly all do, and all other entries as an object of their own.

    None of any other header, and of one that can't be understood. Digests are most of a header of ours, some MB of a large file's: so they
    are gone over only once, where they are.
    """
    begin = 8 + len(_FREE_TEXT_FIRST) - 1
    end = start.find(b"}", begin) + 1
    is_first = start.startswith(_FREE_TEXT_FIRST, 8) and start[end : end + 2] == b',"'
    if not is_first or np.frombuffer(start, np.uint8, offset=8).max() > 127:
        return None
    try:
        # A brace in a string doesn't close the object: then this is none.
        metadata = _METADATA_DECODER.decode(memoryview(start)[begin:end])
    except (msgspec.MsgspecError, RecursionError):
        return None
    return metadata, b"{" + start[end + 1 :]


class _Digests:
    """The digests of a header, of which each tensor takes its own; where nobody is to have them, they are only counted."""

    def __init__(self, text: str | None, file: str, *, are_given: bool) -> None:
        self._file = file
        self._are_given = are_given
        self._text = text
        found = parse_digests(text) if text is not None and are_given else b""
        if found is None:
            raise self._wrong("so many times 32 hexadecimal digits")
        self._all = found
        self._taken = 0

    def take(self, number: int) -> bytes:
        """The next ones."""
        begin = self._taken
        self._taken = end = begin + number * DIGEST_BYTES
        return self._all[begin:end] if self._are_given else b""

    def take_each(self, numbers: Sequence[int]) -> Iterable[bytes]:
        """So many for each of several tensors, one after the other."""
        ends = (self._taken + DIGEST_BYTES * np.cumsum([0, *numbers])).tolist()
        self._taken = ends[-1]
        return map(self._all.__getitem__, map(slice, ends, ends[1:])) if self._all and self._are_given else repeat(b"")

    def check_end(self, tensors: int) -> None:
        """See that there were as many as the tensors took."""
        if self._text is not None and 2 * self._taken != len(self._text):
            raise self._wrong(f"{2 * self._taken} hexadecimal digits for the row blocks of {tensors} tensors")

    def _wrong(self, expected: str) -> DataFileError:
        return DataFileError(
            "the digests in the header can't be understood",
            file=self._file,
            field=DIGEST_NAME,
            found=f"{len(self._text or '')} characters",
            expected=expected,
            fix=DAMAGED,
        )


class _Alike(NamedTuple):
    """What tensors of one type and shape have in common: both, their bytes, and how many row blocks they have."""

    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    blocks: int

    @classmethod
    def of(cls, code: str, shape: tuple[int, ...]) -> _Alike | None:
        """Of a type's code; None when numpy has no such array.

        Raises:
            UsageError: a type that checkpoints don't hold.
        """
        dtype = by_safetensors(code)
        # An empty tensor has no bytes that would keep its other dimensions in bounds.
        is_too_large = len(shape) > _MAX_DIMENSIONS or (0 in shape and prod(max(extent, 1) for extent in shape) >= _MAX_ELEMENTS)
        if is_too_large or (shape and min(shape) < 0):
            return None
        return cls(dtype, shape, dtype.itemsize * prod(shape), row_blocks_of(shape, dtype.itemsize).number)


_KIND_OF: Callable[[_AnyEntry], tuple[str, tuple[int, ...]]] = attrgetter("dtype", "shape")
_PLACE_OF: Callable[[_AnyEntry], tuple[int, int]] = attrgetter("data_offsets")


def _entries_at_once(text: bytes, nbytes: int, file_size: int, digests: _Digests) -> dict[str, TensorEntry] | None:
    """The entries of a header that names tensors in the order of their bytes, as all known programs write them.

    None where it doesn't, or where anything else is unusual about any of them: a look at one by one shows it.
    """
    try:
        listed = _ENTRIES_DECODER.decode(text)
        listed.pop(METADATA, None)
        kinds = list(map(_KIND_OF, listed.values()))
        known = {kind: _Alike.of(*kind) for kind in set(kinds)}
        if None in known.values():
            return None
        alike = map(known.__getitem__, kinds)
        places = np.fromiter(chain.from_iterable(map(_PLACE_OF, listed.values())), np.int64, 2 * len(listed)).reshape(-1, 2)
        dtypes, shapes, sizes, blocks = zip(*alike, strict=True) if kinds else ((), (), (), ())
        borders = np.concatenate([np.zeros(1, np.int64), places[:, 1]])
        # No number is negative, so that no difference of two leaves 64 bits.
        is_usual = (places >= 0).all() and (borders[:-1] == places[:, 0]).all() and (np.diff(borders) == np.array(sizes, np.int64)).all()
    except (msgspec.MsgspecError, RecursionError, UsageError, OverflowError):
        return None
    if not is_usual or nbytes + int(borders[-1]) != file_size:
        return None
    begins = (nbytes + borders).tolist()
    entries = rows(TensorEntry, listed, dtypes, shapes, begins, begins[1:], digests.take_each(blocks))
    return dict(zip(listed, entries, strict=True))


def _entries_one_by_one(text: bytes, nbytes: int, file: str, digests: _Digests) -> dict[str, TensorEntry]:
    """The entries of any header, in the order in which it names them.

    Raises:
        DataFileError: what is wrong with the first that can't be.
    """
    raw = json_text.decode(text, _TEXT_DECODER, file, error=DataFileError)
    raw.pop(METADATA, None)
    return {name: _entry(name, item, nbytes, file, digests) for name, item in raw.items()}


def _in_order(entries: Mapping[str, TensorEntry], nbytes: int, file_size: int, file: str) -> dict[str, TensorEntry]:
    """The same entries in the order of their bytes.

    Raises:
        DataFileError: these aren't all that the file has, each once.
    """
    ordered = sorted(entries.values(), key=lambda entry: (entry.begin, entry.end))
    position = nbytes
    for entry in ordered:
        if entry.begin != position:
            what = "overlap" if entry.begin < position else "leave a hole"
            raise DataFileError(
                f"tensors of a file {what}",
                file=file,
                tensor=entry.name,
                found=f"begins at byte {entry.begin}",
                expected=f"byte {position}",
                fix=DAMAGED,
            )
        position = entry.end
    if position != file_size:
        what = "the file is truncated" if position > file_size else "the file has more bytes than its header promises"
        raise DataFileError(what, file=file, found=f"{file_size} bytes", expected=f"{position} bytes, as its header promises", fix=DAMAGED)
    return {entry.name: entry for entry in ordered}


def _entry(name: str, raw: msgspec.Raw, nbytes: int, file: str, digests: _Digests) -> TensorEntry:
    try:
        item = _ENTRY_DECODER.decode(raw)
        alike = _Alike.of(item.dtype, item.shape)
    except (msgspec.MsgspecError, RecursionError) as cause:
        raise DataFileError(
            "a tensor's entry in the header can't be understood", file=file, tensor=name, found=str(cause), fix=DAMAGED
        ) from cause
    except UsageError as cause:
        raise DataFileError(cause.what, file=file, tensor=name, expected=cause.expected) from cause
    begin, end = item.data_offsets
    if begin < 0 or end < begin or alike is None:
        raise DataFileError(
            "a tensor's entry in the header has impossible numbers",
            file=file,
            tensor=name,
            found=f"shape {reprlib.repr(item.shape)}, offsets {begin} to {end}",
            fix=DAMAGED,
        )
    if end - begin != alike.nbytes:
        raise DataFileError(
            "a tensor's bytes in the header contradict its shape",
            file=file,
            tensor=name,
            found=f"{end - begin} bytes",
            expected=f"{alike.nbytes} bytes for {alike.dtype} of shape {alike.shape}",
            fix=DAMAGED,
        )
    return TensorEntry(name, alike.dtype, alike.shape, begin + nbytes, end + nbytes, digests.take(alike.blocks))
