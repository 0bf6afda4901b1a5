"""Messages of Protocol Buffers as they lie in a file: fields by their numbers, with every length checked before it is used.

Nothing is decoded that isn't asked for, so that a field of many gigabytes costs no more than one of a few bytes. Source: the documentation
of the encoding of Protocol Buffers (protobuf.dev).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from reshard.errors import DamagedCheckpointError, DataFileError
from reshard.storage import ReadableFile

VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5

# A varint has 7 bits in a byte, and 64 altogether.
_MOST_VARINT_BYTES = 10

# Read at a time: the head of a tensor is some ten bytes, and what comes after it is skipped; many small ones lie in one window.
_WINDOW_BYTES = 1 << 14

_FIX = "the file is damaged, or of another kind: restore it from a copy"


class Field(NamedTuple):
    """A field of a message.

    Attributes:
        number: which one.
        kind: how it is encoded: `VARINT`, `BYTES`, `FIXED_64` or `FIXED_32`.
        value: a varint's value, signed, of 64 bits; 0 for others.
        begin: where its bytes begin in the file; of a varint where it ends.
        end: where they end, exclusive.
    """

    number: int
    kind: int
    value: int
    begin: int
    end: int


class Messages:
    """The messages of a file.

    Args:
        file: the open file; it stays the caller's.
        what: what the file should be, for errors.
        error: what a damaged one is.
    """

    def __init__(self, file: ReadableFile, what: str, error: type[DamagedCheckpointError] = DataFileError) -> None:
        self.path = file.path
        self.size = file.size
        self._file = file
        self._what = what
        self._error = error
        self._at = 0
        self._window = b""

    def fields(self, begin: int, end: int) -> Iterator[Field]:
        """The fields of the message between two places of the file.

        Raises:
            DamagedCheckpointError: of the file's kind: they are no message.
        """
        at = begin
        while at < end:
            key, at = self._varint(at, end)
            number, kind = key >> 3, key & 7
            if kind == VARINT and number:
                value, at = self._varint(at, end)
                yield Field(number, kind, value - (1 << 64) if value >> 63 else value, at, at)
                continue
            if kind == BYTES:
                nbytes, at = self._varint(at, end)
            else:
                nbytes = {FIXED_64: 8, FIXED_32: 4}.get(kind, -1)
            if not number or nbytes < 0:
                raise self.bad(f"field {number} of kind {kind} at byte {at}", "a field of Protocol Buffers")
            if nbytes > end - at:
                raise self.bad(f"field {number} of {nbytes} bytes at byte {at}", f"at most {end - at} bytes, what is left")
            yield Field(number, kind, 0, at, at + nbytes)
            at += nbytes

    def integers(self, field: Field) -> Iterator[int]:
        """The values of a repeated field of integers: one, or several where they are packed.

        Raises:
            DamagedCheckpointError: of the file's kind: it is another kind of field.
        """
        if field.kind == VARINT:
            yield field.value
            return
        self.check_bytes(field)
        at = field.begin
        while at < field.end:
            value, at = self._varint(at, field.end)
            yield value - (1 << 64) if value >> 63 else value

    def text(self, field: Field, most: int) -> str:
        """A field as text.

        Args:
            field: of this file.
            most: the bytes that such a text has at most.

        Raises:
            DamagedCheckpointError: of the file's kind: it is longer, no text, or another kind of field.
        """
        try:
            return self.bytes(field, most).decode()
        except UnicodeDecodeError as cause:
            raise self.bad(f"field {field.number} at byte {field.begin}: {cause}", "text in UTF-8") from cause

    def bytes(self, field: Field, most: int) -> bytes:
        """The bytes of a field.

        Args:
            field: of this file.
            most: as in `text`.

        Raises:
            DamagedCheckpointError: of the file's kind: there are more, or it is another kind of field.
        """
        self.check_bytes(field)
        nbytes = field.end - field.begin
        if nbytes > most:
            raise self.bad(f"field {field.number} of {nbytes} bytes at byte {field.begin}", f"at most {most} bytes")
        return self.read(field.begin, nbytes)

    def check_bytes(self, field: Field) -> None:
        """See that a field has bytes.

        Raises:
            DamagedCheckpointError: of the file's kind: it is a number.
        """
        if field.kind != BYTES:
            raise self.bad(f"field {field.number} of kind {field.kind} before byte {field.end}", "a field of bytes")

    def read(self, begin: int, nbytes: int) -> bytes:
        """Bytes of the file; what follows them is kept, for the next ones.

        Raises:
            StorageError: the storage refuses, or the file ends before them.
        """
        first = begin - self._at
        if first < 0 or first + nbytes > len(self._window):
            if nbytes > _WINDOW_BYTES:
                return self._fetch(begin, nbytes)
            self._window = self._fetch(begin, max(nbytes, min(_WINDOW_BYTES, self.size - begin)))
            self._at, first = begin, 0
        return self._window[first : first + nbytes]

    def bad(self, found: str, expected: str, tensor: str | None = None) -> DamagedCheckpointError:
        """The error for what doesn't belong into such a file."""
        return self._error(f"not {self._what}", file=self.path, tensor=tensor, found=found, expected=expected, fix=_FIX)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        data = self.read(at, min(_MOST_VARINT_BYTES, end - at))
        for index, byte in enumerate(data):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                # As the reference implementation: what doesn't fit into 64 bits falls away.
                return value & 0xFFFF_FFFF_FFFF_FFFF, at + index + 1
        raise self.bad(f"a number without an end at byte {at}", f"at most {_MOST_VARINT_BYTES} bytes, {end - at} are left")

    def _fetch(self, begin: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        self._file.read_into(begin, memoryview(buffer))
        return bytes(buffer)
