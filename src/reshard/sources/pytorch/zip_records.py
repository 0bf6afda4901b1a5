"""The records of a `torch.save` file: a zip archive whose members are stored as they are, so that their bytes can be read in place.

Source: PKWARE's APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end), 4.5.3 (64 bits);
and `caffe2/serialize/inline_container` of PyTorch, which writes them: `{archive}/data.pkl`, `{archive}/data/{key}`, aligned to 64 bytes.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from reshard.errors import DataFileError
from reshard.storage import ReadableFile

_END = struct.Struct("<4s4H2IH")
_END_64_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")

_IN_64 = 0xFFFFFFFF

# What is read at a time: an archive of one small tensor is 1.5 KB, and is read whole.
_WINDOW_BYTES = 4096

# The end is followed by a comment of at most 64 KiB; PyTorch writes none.
_MOST_COMMENT = 0

# A record has some 100 bytes in the directory; a file of 100,000 tensors has 300,000.
_MOST_DIRECTORY_BYTES = 1 << 28
_MOST_PICKLE_BYTES = 1 << 30

_DAMAGED = "the file is damaged, or was never finished: restore it from a copy, or save it again"


class Record(NamedTuple):
    """A member of the archive.

    Attributes:
        header: where its own header begins in the file.
        nbytes: its bytes.
    """

    header: int
    nbytes: int


class ZipRecords:
    """The records of an archive, by their names without the archive's own. Its directory is read and checked when it is made.

    Args:
        file: the file that holds it.
        begin: where the archive begins in the file.
        nbytes: of the archive; the rest of the file when it isn't given.

    Raises:
        DataFileError: it is no archive of stored records, or sizes and offsets in it can't be.
        StorageError: the storage refuses.
    """

    def __init__(self, file: ReadableFile, begin: int = 0, nbytes: int | None = None) -> None:
        self.path = file.path
        self._file = file
        self._begin = begin
        self._size = file.size - begin if nbytes is None else nbytes
        self._windows: list[tuple[int, bytes]] = []
        if begin < 0 or self._size < _END.size or begin + self._size > file.size:
            raise self._bad("the end of the file", f"{self._size} bytes from byte {begin} of {file.size}")
        self._directory, directory_bytes, count = self._find_directory()
        self._records = self._read_directory(directory_bytes, count)

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def find(self, name: str) -> tuple[int, int]:
        """Where the bytes of a record begin in the file, and how many they are.

        Raises:
            DataFileError: there is no such record, or it is not as the directory says.
        """
        record = self._records.get(name)
        if record is None:
            raise self._bad(f"the record {name!r}", f"{len(self._records)} other records")
        head = _LOCAL.unpack(self._read(record.header, _LOCAL.size))
        begin = record.header + _LOCAL.size + head[-2] + head[-1]
        if head[0] != b"PK\x03\x04" or begin + record.nbytes > self._directory:
            raise self._bad(f"the header of record {name!r}", f"{head[0]!r}, data from byte {begin}")
        return self._begin + begin, record.nbytes

    def read(self, name: str, most: int = _MOST_PICKLE_BYTES) -> bytes:
        """The bytes of a small record.

        Raises:
            DataFileError: as in `find`; or it is larger than such a record is.
        """
        begin, nbytes = self.find(name)
        if nbytes > most:
            raise self._bad(f"at most {most} bytes in record {name!r}", f"{nbytes} bytes")
        return self._read(begin - self._begin, nbytes)

    def _find_directory(self) -> tuple[int, int, int]:
        """Where the directory begins in the archive, its bytes, and how many records it lists."""
        at = self._size - _END.size
        end = _END.unpack(self._read(at, _END.size))
        if end[0] != b"PK\x05\x06" or end[-1] != _MOST_COMMENT:
            raise self._bad("the end of a zip archive", repr(end[0]))
        count, nbytes, begin = end[4], end[5], end[6]
        locator_at = at - _END_64_LOCATOR.size
        if locator_at >= 0:
            mark, disk, at_64, disks = _END_64_LOCATOR.unpack(self._read(locator_at, _END_64_LOCATOR.size))
            if mark == b"PK\x06\x07":
                if disk != 0 or disks > 1 or at_64 + _END_64.size > locator_at:
                    raise self._bad("the end of an archive of 64 bits", f"at byte {at_64}")
                end_64 = _END_64.unpack(self._read(at_64, _END_64.size))
                if end_64[0] != b"PK\x06\x06":
                    raise self._bad("the end of an archive of 64 bits", repr(end_64[0]))
                count, nbytes, begin = end_64[7], end_64[8], end_64[9]
                at = at_64
        if begin + nbytes > at or nbytes > _MOST_DIRECTORY_BYTES or count > nbytes // _CENTRAL.size:
            raise self._bad("a directory inside the archive", f"{count} records, {nbytes} bytes from byte {begin}")
        return begin, nbytes, count

    def _read_directory(self, nbytes: int, count: int) -> dict[str, Record]:
        data = self._read(self._directory, nbytes)
        records: dict[str, Record] = {}
        at = 0
        for _ in range(count):
            if at + _CENTRAL.size > nbytes:
                raise self._bad(f"{count} records in the directory", f"{len(records)}")
            part = _CENTRAL.unpack_from(data, at)
            mark, flags, method = part[0], part[3], part[4]
            packed, size, header = part[8], part[9], part[16]
            name_bytes, extra_bytes, comment_bytes = part[10], part[11], part[12]
            after_name = at + _CENTRAL.size + name_bytes
            name = data[at + _CENTRAL.size : after_name].decode("utf-8", "replace")
            if mark != b"PK\x01\x02" or after_name + extra_bytes > nbytes:
                raise self._bad("an entry of the directory", f"{mark!r} at byte {at}")
            packed, size, header = _in_64_bits(data[after_name : after_name + extra_bytes], packed, size, header)
            if method != 0 or packed != size or flags & 1:
                raise self._bad(f"record {name!r} stored as it is", f"method {method}, {packed} bytes for {size}")
            if header + _LOCAL.size + size > self._directory:
                raise self._bad(f"record {name!r} inside the archive", f"{size} bytes from byte {header}")
            # The first part of every name is the archive's own.
            short = name.partition("/")[2] or name
            if short in records:
                raise self._bad("records of different names", f"two of {name!r}")
            records[short] = Record(header, size)
            at = after_name + extra_bytes + comment_bytes
        return records

    def _read(self, at: int, nbytes: int) -> bytes:
        """Bytes of the archive, at an offset in it; what lies around them is kept, for the next ones."""
        for begin, data in self._windows:
            if begin <= at and at + nbytes <= begin + len(data):
                return data[at - begin : at - begin + nbytes]
        if nbytes >= _WINDOW_BYTES or at < 0 or at + nbytes > self._size:
            return self._fetch(at, nbytes)
        # The end of an archive is read first, and what comes before it is wanted next.
        begin = max(0, min(at + nbytes, self._size) - _WINDOW_BYTES) if not self._windows else at
        data = self._fetch(begin, min(_WINDOW_BYTES, self._size - begin))
        self._windows = [*self._windows[-1:], (begin, data)]
        return data[at - begin : at - begin + nbytes]

    def _fetch(self, at: int, nbytes: int) -> bytes:
        if at < 0 or nbytes < 0 or at + nbytes > self._size:
            raise self._bad("all of the archive", f"{self._size} bytes, {nbytes} wanted from byte {at}")
        buffer = bytearray(nbytes)
        self._file.read_into(self._begin + at, memoryview(buffer))
        return bytes(buffer)

    def _bad(self, expected: str, found: str) -> DataFileError:
        where = "" if not self._begin else f" (in the archive at byte {self._begin})"
        return DataFileError("not what torch.save writes", file=self.path, found=found + where, expected=expected, fix=_DAMAGED)


def _in_64_bits(extra: bytes, packed: int, size: int, header: int) -> tuple[int, int, int]:
    """The numbers of an entry that has some of them in its extra field."""
    if _IN_64 not in (packed, size, header):
        return packed, size, header
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            numbers = list(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            # In this order, and only those that the entry has no room for.
            size, packed, header = (numbers.pop(0) if value == _IN_64 and numbers else value for value in (size, packed, header))
            break
        at += 4 + length
    return packed, size, header
