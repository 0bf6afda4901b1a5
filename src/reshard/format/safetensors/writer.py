"""Write a safetensors file straight out of the tensors' memory, and hash its row blocks on the way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from math import prod

import numpy as np

from reshard.errors import CaptureError, naming
from reshard.format.digest import Hasher, digest_of
from reshard.format.safetensors.planned import Kin, PlannedHeader
from reshard.format.seal import SealedFile
from reshard.state import Memory
from reshard.storage import Storage, WritableFile

# What is hashed and then written: small enough that a core's cache still has it, large enough that the cost per call vanishes.
PIECE_BYTES = 2 << 20

# From this size on contiguous memory is written from where it lies; below, a call per tensor costs more than gathering many for one.
_DIRECT_BYTES = 64 << 10


@dataclass(frozen=True)
class StreamedArray:
    """An array that is larger than what is to be held of it at a time.

    Attributes:
        dtype: its element type.
        shape: its shape.
        parts: gives its parts in the order of its bytes.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[np.ndarray]]


# What a tensor's values are taken from. Memory is asked for a small tensor's address, and for an array only where it has none: a view of
# each of 100,000 tensors costs more than all else that is done with its bytes.
Values = np.ndarray | np.generic | StreamedArray | Memory
_ARRAYS = (np.ndarray, np.generic, StreamedArray)


def write_tensors(
    storage: Storage,
    path: str,
    header: PlannedHeader,
    arrays: Iterable[tuple[str, Values]],
    *,
    piece_bytes: int = PIECE_BYTES,
    written: Callable[[int], None] | None = None,
) -> SealedFile:
    """Write a new file: the data in pieces, each hashed before it is written, then the header, then make it durable.

    Contiguous memory is written from where it lies; small or strided tensors are gathered in one piece of `piece_bytes`.

    Args:
        storage: where to.
        path: of the new file.
        header: as `plan_header` made it.
        arrays: the values of every entry by name, in the order of `header.names`; of the entry's shape and element type, any strides.
            Memory must live until this returns.
        piece_bytes: bytes per piece, and the most memory that is used beside the tensors'.
        written: is told of every piece, how long it was.

    Returns:
        What the checkpoint's seal says of the file.

    Raises:
        CaptureError: an array that the header doesn't have at this place, one that doesn't fit its entry, or entries without an array.
        StorageError: the storage refuses.
    """
    with storage.create(path, header.file_size) as file:
        stream = _Stream(file, header.nbytes, piece_bytes, written, hashed=header.digests_at is not None)
        small_bytes = stream.small_bytes
        buffers: dict[int, type[ctypes.Array[ctypes.c_char]]] = {}  # so many bytes somewhere in memory: to make the type takes longest
        for given, name, kin in zip_longest(arrays, header.names, header.kin):
            if given is None or given[0] != name:
                raise _misplaced(path, given, name)
            values = given[1]
            if not isinstance(values, _ARRAYS):
                nbytes = kin.nbytes
                address = values.address if 0 < nbytes <= small_bytes else None
                if address is not None and values.nbytes == nbytes:
                    buffer = buffers.get(nbytes) or buffers.setdefault(nbytes, ctypes.c_char * nbytes)
                    stream.gather(buffer.from_address(address), kin)
                    continue
                values = _read(values, name)
            array = values if isinstance(values, StreamedArray) else np.asarray(values)
            if array.shape != kin.shape or array.dtype != kin.dtype.numpy:
                raise _unfit(path, kin, name, array)
            stream.write(array, kin)
        stream.flush()
        start = header.encode(stream.digests)
        file.write_at(0, memoryview(start))
        file.sync()
    return SealedFile(header.file_size, len(start), digest_of(start))


def _read(memory: Memory, name: str) -> np.ndarray:
    try:
        return memory.read()
    except CaptureError as error:
        raise naming(error, name) from error


def _misplaced(path: str, given: tuple[str, Values] | None, name: str | None) -> CaptureError:
    if given is None:
        return CaptureError("a tensor that the header promises was not written", file=path, tensor=name)
    return CaptureError(
        "a tensor that the header doesn't have at this place",
        file=path,
        tensor=given[0],
        expected="no more tensors" if name is None else name,
    )


def _unfit(path: str, kin: Kin, name: str, array: np.ndarray | StreamedArray) -> CaptureError:
    return CaptureError(
        "a tensor's memory doesn't fit its entry in the header",
        file=path,
        tensor=name,
        found=f"{array.dtype} of shape {array.shape}",
        expected=f"{kin.dtype} of shape {kin.shape}",
    )


class _Stream:
    """The data of a file, one tensor after the other.

    Attributes:
        digests: of the row blocks of the tensors that are written; of those that wait only after `flush`.
        small_bytes: a tensor of at most so many waits for others.
    """

    def __init__(self, file: WritableFile, begin: int, piece_bytes: int, written: Callable[[int], None] | None, *, hashed: bool) -> None:
        self.digests: list[bytes] = []
        self._file = file
        self._position = begin
        # At least one element of the widest type.
        self._piece_bytes = max(piece_bytes, 16)
        self._hashed = hashed
        self._written = written
        self.small_bytes = min(_DIRECT_BYTES, self._piece_bytes)
        # The tensors that wait, and their bytes.
        self._waiting: list[np.ndarray | ctypes.Array[ctypes.c_char]] = []
        self._kin: list[Kin] = []
        self._waiting_bytes = 0
        self._stage = np.empty(0, np.uint8)

    def gather(self, data: np.ndarray | ctypes.Array[ctypes.c_char], kin: Kin) -> None:
        """Keep the bytes of a small tensor (its values must stay) until a piece is full."""
        nbytes = kin.nbytes
        if self._waiting_bytes + nbytes > self._piece_bytes:
            self.flush()
        self._waiting.append(data)
        self._kin.append(kin)
        self._waiting_bytes += nbytes

    def write(self, array: np.ndarray | StreamedArray, kin: Kin) -> None:
        """Write a tensor, or keep it (its values must stay) until a piece is full."""
        nbytes = kin.nbytes
        parts: Iterable[np.ndarray] = array.parts() if isinstance(array, StreamedArray) else (array,)
        if not isinstance(array, StreamedArray) and nbytes <= self.small_bytes:
            self.gather(array if array.flags.c_contiguous else np.ascontiguousarray(array), kin)
            return
        self.flush()
        hasher = _BlockHasher(kin.block_bytes, self.digests) if self._hashed else None
        begin = self._position
        for piece in (piece for part in parts for piece in _pieces(part, self._piece_bytes)):
            data = self._bytes_of(piece)
            if hasher is not None:
                hasher.update(data)
            self._put(data)
        if hasher is not None:
            hasher.close()
        if self._position - begin != nbytes:
            raise CaptureError("the parts of a tensor don't make up the whole", found=f"{self._position - begin} bytes", expected=nbytes)

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        # Numpy gives the bytes of any element type, where `memoryview` knows no bfloat16.
        data = memoryview(b"".join(self._waiting))
        if self._hashed:
            # Of what is written, not of where it comes from: should that change meanwhile, the file would seem damaged.
            at = 0
            for kin in self._kin:
                end = at + kin.nbytes
                if kin.blocks == 1:
                    self.digests.append(digest_of(data[at:end]))
                else:
                    step = kin.block_bytes
                    self.digests += [digest_of(data[begin : min(begin + step, end)]) for begin in range(at, end, step)]
                at = end
        self._put(data)
        self._waiting.clear()
        self._kin.clear()
        self._waiting_bytes = 0

    def _put(self, data: memoryview) -> None:
        if data.nbytes:
            self._file.write_at(self._position, data)
            self._position += data.nbytes
            if self._written is not None:
                self._written(data.nbytes)

    def _bytes_of(self, piece: np.ndarray) -> memoryview:
        """A piece's bytes where they lie, or gathered."""
        if piece.flags.c_contiguous:
            return memoryview(piece.reshape(-1).view(np.uint8))
        if not self._stage.nbytes:
            self._stage = np.empty(self._piece_bytes, np.uint8)
        target = self._stage[: piece.nbytes]
        # A piece begins where memory for any element type does.
        target.view(piece.dtype).reshape(piece.shape)[...] = piece
        return memoryview(target)


class _BlockHasher:
    """Hashes the row blocks of a tensor, whose bytes come in order."""

    def __init__(self, block_bytes: int, digests: list[bytes]) -> None:
        self._block_bytes = block_bytes
        self._digests = digests
        self._begun: Hasher | None = None
        self._missing = 0  # bytes of the block that has begun

    def update(self, data: memoryview) -> None:
        """The next bytes."""
        at = 0
        while at < len(data):
            left = len(data) - at
            if self._begun is None:
                if left >= self._block_bytes:
                    self._digests.append(digest_of(data[at : at + self._block_bytes]))
                    at += self._block_bytes
                    continue
                self._begun, self._missing = Hasher(), self._block_bytes
            taken = min(left, self._missing)
            self._begun.update(data[at : at + taken])
            self._missing -= taken
            at += taken
            if not self._missing:
                self.close()

    def close(self) -> None:
        """That was the last of a block."""
        if self._begun is not None:
            self._digests.append(self._begun.digest())
            self._begun = None


def _pieces(array: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Views that together are the array in row-major order, each of at most `limit` bytes and at least one element."""
    if array.nbytes <= limit:
        yield array
        return
    if array.flags.c_contiguous:
        array = array.reshape(-1)
    row = array.itemsize * prod(array.shape[1:])
    rows = limit // row
    if rows:
        for begin in range(0, len(array), rows):
            yield array[begin : begin + rows]
    else:
        for part in array:
            yield from _pieces(part, limit)
