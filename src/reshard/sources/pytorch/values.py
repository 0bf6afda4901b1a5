"""Values beside the tensors, as extras hold them: read out of what `torch.save` wrote, bounded in depth and number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from reshard.errors import DataFileError
from reshard.format.extra import FrameworkArray
from reshard.sources.pytorch.objects import TORCH_OBJECTS, TensorRef
from reshard.sources.pytorch.pickles import read_pickle
from reshard.sources.pytorch.vocabulary import Record, Word
from reshard.sources.pytorch.zip_records import ZipRecords
from reshard.storage import ReadableFile

PICKLE, BYTE_ORDER, DATA = "data.pkl", "byteorder", "data/"

# Far more than a schedule or a data position has, and than hyper-parameters nest.
_MOST_VALUES = 1 << 20
_MAX_DEPTH = 50

# A tensor among values is a random state or a learning rate; what is larger belongs into the catalog.
MOST_TENSOR_BYTES = 1 << 20


def open_archive(file: ReadableFile, begin: int = 0, nbytes: int | None = None) -> tuple[ZipRecords, Any]:
    """The records of a `torch.save` archive, and the value that it describes, its tensors as references.

    Args:
        file: the file that holds it.
        begin: where it begins in the file.
        nbytes: its length; the rest of the file when it isn't given.

    Raises:
        DataFileError: it is no such archive, of another byte order, or it names what isn't taken from files.
        StorageError: the storage refuses.
    """
    records = ZipRecords(file, begin, nbytes)
    if BYTE_ORDER in records and records.read(BYTE_ORDER, 16) != b"little":
        raise DataFileError(
            "tensors whose bytes are in the order of another kind of machine",
            file=file.path,
            found="big-endian",
            expected="little-endian",
            fix="load and save it again on a little-endian machine",
        )
    return records, read_pickle(records.read(PICKLE), TORCH_OBJECTS, file.path)


def place_of(records: ZipRecords, tensor: TensorRef) -> int:
    """Where a tensor's first byte lies in the file, seen to be followed by all that its strides reach.

    Raises:
        DataFileError: the archive has no such storage, or a shorter one.
    """
    begin, nbytes = records.find(DATA + tensor.storage.key)
    reach = 0 if 0 in tensor.shape else 1 + sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.strides, strict=True))
    needed = tensor.begin + reach * tensor.dtype.itemsize
    if needed > nbytes:
        raise DataFileError(
            "a tensor that reaches beyond its storage",
            file=records.path,
            found=f"{nbytes} bytes in {DATA}{tensor.storage.key}",
            expected=f"at least {needed}",
            fix="the file is damaged: restore it from a copy",
        )
    return begin + tensor.begin


def read_array(file: ReadableFile, records: ZipRecords, tensor: TensorRef) -> np.ndarray:
    """The values of a small tensor.

    Raises:
        DataFileError: as `place_of`; or it is no small one, or not contiguous.
    """
    if tensor.nbytes > MOST_TENSOR_BYTES or not tensor.is_contiguous:
        raise DataFileError("a large or strided tensor among values", file=file.path, found=f"{tensor.dtype} {list(tensor.shape)}")
    array = np.empty(tensor.shape, tensor.dtype.numpy)
    if array.nbytes:
        file.read_into(place_of(records, tensor), memoryview(array.reshape(-1).view(np.uint8)))
    return array


class ValueReader:
    """Makes values for extras of what an archive describes.

    Args:
        file: the file.
        records: of the archive in it.
    """

    def __init__(self, file: ReadableFile, records: ZipRecords) -> None:
        self._file = file
        self._records = records
        self._left = _MOST_VALUES

    def read(self, value: Any, depth: int = 0) -> Any:
        """A value with its tensors read.

        Raises:
            DataFileError: an object that is no plain value; values nested too deeply, or without end.
        """
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise DataFileError("values that are nested too deeply, or repeat without end", file=self._file.path)
        kind = type(value)
        if kind is TensorRef:
            return FrameworkArray("torch", value.dtype.name, read_array(self._file, self._records, value))
        if kind is Word:
            return value.name
        if kind is dict:
            return {self.read(key, depth + 1): self.read(item, depth + 1) for key, item in value.items()}
        if kind in (list, tuple, set, frozenset):
            return kind(self.read(item, depth + 1) for item in value)
        if kind is Record or kind not in (str, int, float, bool, bytes, type(None)):
            raise DataFileError(
                "an object that is no plain value", file=self._file.path, found=value.name if kind is Record else kind.__name__
            )
        return value


def value_or_problem(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """A value, or why it can't be had: what lies beside the tensors is no reason to refuse them."""
    try:
        return read(), None
    except DataFileError as error:
        return None, error.what + ("" if error.found is None else f" ({error.found})")
