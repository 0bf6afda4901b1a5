"""MindSpore tensors as the memory of shards: the host's as numpy views, an accelerator's through copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mindspore
import numpy as np
from mindspore.common.initializer import Zero

from reshard.errors import CaptureError, UsageError
from reshard.geometry import DType, Region
from reshard.geometry.dtypes import by_mindspore, by_name
from reshard.state import Memory


def dtype_of(dtype: object) -> DType:
    """The element type of a MindSpore dtype.

    Raises:
        UsageError: one that checkpoints don't hold (int4, complex128, …).
    """
    found = by_mindspore(str(dtype))
    return found if found is not None else by_name(str(dtype))


def checked_dtype(tensor: mindspore.Tensor, name: str) -> DType:
    """The element type of a tensor that is to be captured.

    Raises:
        CaptureError: a tensor without values yet, or of a type that checkpoints don't hold.
    """
    if tensor.has_init:
        raise CaptureError("a parameter has no memory yet", tensor=name, fix="call init_parameters_data() of the network first")
    try:
        return dtype_of(tensor.dtype)
    except UsageError as error:
        raise CaptureError(error.what, tensor=name, found=error.found, expected=error.expected) from error


def array_of(tensor: mindspore.Tensor) -> np.ndarray:
    """A tensor's values as an array of the matching numpy type: on the CPU the memory itself, else a copy.

    MindSpore has numpy types of its own where numpy has none; they are seen as those of ml_dtypes, which have the same bytes.
    """
    array = tensor.asnumpy()
    wanted = dtype_of(tensor.dtype).numpy
    return array if array.dtype == wanted else array.view(f"u{wanted.itemsize}").view(wanted)


def memory_of(tensor: mindspore.Tensor) -> Memory:
    """The memory of a tensor that `checked_dtype` has passed: on the CPU without a copy."""
    array = array_of(tensor)
    # On a device `asnumpy` gives a copy, and the tensor's address is the device's.
    is_on_host = array.size == 0 or (array.flags.writeable and tensor.data_ptr() == array.ctypes.data)
    return TensorMemory(tensor) if is_on_host else DeviceMemory(tensor)


def to_tensor(array: np.ndarray, dtype: DType) -> mindspore.Tensor:
    """A tensor of its own with the values of an array of the matching numpy type."""
    if dtype.numpy.isbuiltin == 1:
        return mindspore.Tensor(np.array(array, copy=True))
    tensor = mindspore.Tensor(shape=array.shape, dtype=getattr(mindspore, dtype.name), init=Zero()).init_data()
    array_of(tensor)[...] = array
    return tensor


@dataclass(frozen=True, slots=True)
class TensorMemory:
    """A tensor on the host as the memory of a shard.

    Attributes:
        tensor: one that `checked_dtype` has passed. It is asked for its memory each time: MindSpore may give it another.
    """

    tensor: mindspore.Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def host(self) -> np.ndarray | None:
        return array_of(self.tensor)

    @property
    def address(self) -> int | None:
        array = array_of(self.tensor)
        return array.ctypes.data if array.flags.c_contiguous and array.flags.writeable else None

    def read(self) -> np.ndarray:
        return array_of(self.tensor)

    def write(self, region: Region, values: np.ndarray) -> None:
        array_of(self.tensor)[region.slices] = values

    def hold(self) -> Memory:
        return self

    def begin_copy(self, target: np.ndarray) -> None:
        target[...] = array_of(self.tensor)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of a shard that the host can't address: reading and writing copy.

    Attributes:
        tensor: on an accelerator.
    """

    tensor: mindspore.Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def host(self) -> np.ndarray | None:
        return None

    @property
    def address(self) -> int | None:
        return None

    def read(self) -> np.ndarray:
        return array_of(self.tensor)

    def write(self, region: Region, values: np.ndarray) -> None:
        if region.shape == tuple(self.tensor.shape):
            whole = values
        else:
            whole = np.array(array_of(self.tensor), copy=True)
            whole[region.slices] = values
        self.tensor.assign_value(to_tensor(whole, dtype_of(self.tensor.dtype)))

    def hold(self) -> Memory:
        return self

    def begin_copy(self, target: np.ndarray) -> Callable[[], object] | None:
        target[...] = array_of(self.tensor)
        return None
