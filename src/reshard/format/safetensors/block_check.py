"""Hold bytes of a stored tensor against the digests of its row blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reshard.errors import DataFileError
from reshard.format.digest import DIGEST_BYTES, Hasher, digest_of
from reshard.format.row_blocks import row_blocks_of
from reshard.format.safetensors.header import TensorEntry

# An error names so many places.
_PLACES_SHOWN = 4


class BlockCheck:
    """One stored tensor, of which bytes come piece by piece. A block is held against its digest when all of it came, without a gap before.

    Args:
        entry: the tensor.
        path: its file, for errors.

    Attributes:
        block_bytes: the bytes of its row blocks, of the last one at most.
        verified: how many bytes were held against digests.
        wrong: the blocks whose bytes are not as they were saved, each with the digest that they have.
    """

    def __init__(self, entry: TensorEntry, path: str) -> None:
        self.verified = 0
        self.wrong: list[tuple[int, bytes]] = []
        self.block_bytes = row_blocks_of(entry.shape, entry.dtype.itemsize).nbytes
        self._entry = entry
        self._path = path
        self._size = entry.end - entry.begin
        self._digests = entry.digests
        # The block that has begun: what is hashed of it, and where that ends.
        self._begun: Hasher | None = None
        self._end = 0

    def update(self, offset: int, data: memoryview) -> None:
        """Look at bytes; those of a block come in the order of the file.

        Args:
            offset: where they begin, in bytes from the first one of the tensor.
            data: the bytes.
        """
        if not self._digests:
            return
        if not self._size:
            self._compare(0, [digest_of(b"")], 0)
            return
        block_bytes, end = self.block_bytes, offset + len(data)
        if self._begun is not None and offset == self._end:
            at = self._go_on(self._begun, offset, data)
        else:
            self._begun = None
            at = offset + -offset % block_bytes  # a block that began before is not seen whole
        last = end if end == self._size else end - end % block_bytes
        if at < last:
            digests = [digest_of(data[begin : begin + block_bytes]) for begin in range(at - offset, last - offset, block_bytes)]
            self._compare(at, digests, last - at)
            at = last
        if at < end:
            self._begun, self._end = Hasher(), end
            self._begun.update(data[at - offset :])

    def _go_on(self, begun: Hasher, offset: int, data: memoryview) -> int:
        """The block that has begun goes on; where the bytes after it begin."""
        end = offset + len(data)
        first = (offset - 1) // self.block_bytes * self.block_bytes
        last = min(first + self.block_bytes, self._size)
        if end < last:
            begun.update(data)
            self._end = end
            return end
        begun.update(data[: last - offset])
        self._begun = None
        self._compare(first, [begun.digest()], last - first)
        return last

    def _compare(self, offset: int, digests: list[bytes], nbytes: int) -> None:
        """Hold digests of neighbouring blocks against the header's, all at once; where they differ, one by one."""
        self.verified += nbytes
        first = offset // self.block_bytes if offset else 0
        expected = self._digests[DIGEST_BYTES * first : DIGEST_BYTES * (first + len(digests))]
        if b"".join(digests) == expected:
            return
        for index, digest in enumerate(digests):
            if expected[DIGEST_BYTES * index : DIGEST_BYTES * (index + 1)] != digest:
                self.wrong.append((first + index, digest))

    def raise_if_wrong(self) -> None:
        """Raise what `error` gives.

        Raises:
            DataFileError: bytes that came are not as they were saved.
        """
        if self.wrong:
            raise self.error()

    def error(self) -> DataFileError:
        """The error that says which bytes are wrong."""
        number, digest = self.wrong[0]
        found = _places_of(self._entry, [number for number, _ in self.wrong])
        expected = "the bytes that the file's header has the digests of"
        if len(self.wrong) == 1:
            found += f" with the digest {digest.hex()}"
            expected = f"{self._digests[DIGEST_BYTES * number : DIGEST_BYTES * (number + 1)].hex()}, as the file's header says"
        return DataFileError(
            "the bytes of a tensor are not as they were saved",
            file=self._path,
            tensor=self._entry.name,
            found=found,
            expected=expected,
            fix="the file is damaged: restore it from a copy, or resume from another iteration",
        )


def check_bytes(entry: TensorEntry, data: memoryview, path: str, offset: int = 0) -> int:
    """See that bytes of a tensor are those that were written, as far as they are whole row blocks and the header has digests.

    Args:
        entry: the tensor.
        data: the bytes.
        path: the file, for the error.
        offset: where they begin, in bytes from the tensor's first one.

    Returns:
        How many bytes were held against digests.

    Raises:
        DataFileError: they aren't.
    """
    check = BlockCheck(entry, path)
    check.update(offset, data)
    check.raise_if_wrong()
    return check.verified


def count_whole(entry: TensorEntry, offset: int, nbytes: int) -> int:
    """How many bytes of a run of a tensor are whole row blocks with a digest.

    Args:
        entry: the tensor.
        offset: where the run begins, in bytes from the tensor's first one.
        nbytes: of the run.
    """
    if not entry.digests:
        return 0
    size = entry.end - entry.begin
    if nbytes == size:
        return nbytes
    if len(entry.digests) == DIGEST_BYTES:
        return 0
    block_bytes = row_blocks_of(entry.shape, entry.dtype.itemsize).nbytes
    end = offset + nbytes
    return max(0, (end if end == size else end - end % block_bytes) - offset - -offset % block_bytes)


def _places_of(entry: TensorEntry, numbers: Sequence[int]) -> str:
    """Where row blocks lie, in words: rows, and bytes of the file. Neighbours are one place."""
    blocks = row_blocks_of(entry.shape, entry.dtype.itemsize)
    ends = np.flatnonzero(np.diff(numbers) > 1).tolist()
    firsts, lasts = [0, *(end + 1 for end in ends)], [*ends, len(numbers) - 1]
    places = []
    for first, last in zip(firsts[:_PLACES_SHOWN], lasts, strict=False):
        begin, end = numbers[first], numbers[last] + 1
        text = f"bytes {entry.begin + begin * blocks.nbytes} to {min(entry.begin + end * blocks.nbytes, entry.end)} of the file"
        if blocks.dimension is not None:
            rows = min(end * blocks.rows, entry.shape[blocks.dimension])
            text = f"rows {begin * blocks.rows} to {rows} of dimension {blocks.dimension} ({text})"
        places.append(text)
    more = len(firsts) - len(places)
    return ", ".join(places) + (f" and {more} more place{'s' * (more > 1)}" if more else "")
