"""Torch tensors as the memory of shards: the host's as numpy views, an accelerator's through copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue] - not in its stub

from reshard.errors import CaptureError, UsageError
from reshard.frameworks.torch.transfer import copy_to_host
from reshard.geometry import DType, Region
from reshard.geometry.dtypes import by_name
from reshard.state import Memory

# Torch gives numpy no view of these types; an integer type of the same size carries their bytes, in both directions.
_CARRIERS = {
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@cache
def dtype_of(dtype: torch.dtype) -> DType:
    """The element type of a torch dtype.

    Raises:
        UsageError: one that checkpoints don't hold (quantized types, the fnuz variants of float8, complex128, …).
    """
    return by_name(str(dtype).removeprefix("torch."))


@cache
def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of an element type: the inverse of `dtype_of`."""
    return getattr(torch, dtype.name)


# Types of which no tensor is conjugated.
_REAL = {
    dtype: dtype_of(dtype)
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def checked_dtype(tensor: torch.Tensor, name: str) -> DType:
    """The element type of a tensor that is to be captured.

    Raises:
        CaptureError: a tensor whose elements don't lie in plain memory, or of a type that checkpoints don't hold.
    """
    # Nearly all are plain: states have 100,000 tensors.
    if type(tensor) not in _PLAIN:
        _check_subclass(tensor, name)
    if tensor.layout is not torch.strided:
        raise CaptureError("only dense tensors can be captured", tensor=name, found=tensor.layout, fix="use to_dense()")
    if not tensor.is_cpu and tensor.is_meta:
        raise CaptureError(
            "a tensor on the meta device has no memory", tensor=name, fix="give the model memory first: model.to_empty(device=...)"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise CaptureError("a lazily conjugated or negated tensor can't be captured", tensor=name, fix="use resolve_conj()")
    try:
        return dtype_of(tensor.dtype)
    except UsageError as error:
        raise CaptureError(error.what, tensor=name, found=error.found, expected=error.expected) from error


def _check_subclass(tensor: torch.Tensor, name: str) -> None:
    kind = type(tensor)
    if hasattr(kind, "__tensor_flatten__"):
        raise CaptureError(
            "a tensor subclass that keeps its elements in tensors of its own can't be captured",
            tensor=name,
            found=f"{kind.__module__}.{kind.__qualname__}",
            expected="a plain tensor or a DTensor",
            fix="save the plain tensors that it consists of, or convert it back before saving",
        )
    if isinstance(tensor, UninitializedTensorMixin):
        raise CaptureError(
            "a lazy tensor has no shape yet", tensor=name, found=kind.__name__, fix="run one forward pass before saving or loading"
        )


def memory_of(tensor: torch.Tensor, name: str) -> Memory:
    """The memory of a plain tensor that `checked_dtype` has passed: on the host without a copy, whatever its strides.

    Raises:
        CaptureError: memory that can't be reached.
    """
    if not tensor.is_cpu:
        return DeviceMemory(tensor.detach())
    if type(tensor) not in _PLAIN:
        _view(tensor, name)  # a subclass may have no memory of its own
    return TensorMemory(tensor)


def dtype_and_memory(tensor: torch.Tensor, name: str) -> tuple[DType, Memory]:
    """What `checked_dtype` and `memory_of` say, with one look at what nearly all tensors are: states have 100,000 of them.

    Raises:
        CaptureError: as these.
    """
    if type(tensor) in _PLAIN and tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_neg():
        dtype = _REAL.get(tensor.dtype)
        if dtype is not None:
            return dtype, tuple.__new__(TensorMemory, (tensor,))  # half of what its own function takes
    return checked_dtype(tensor, name), memory_of(tensor, name)


def _view(tensor: torch.Tensor, name: str) -> np.ndarray:
    tensor = tensor.detach()
    carrier = _CARRIERS.get(tensor.dtype)
    try:
        _check_room(tensor, name)  # where the storage is empty numpy makes an array of its own
        if carrier is None:
            return tensor.numpy()
        return tensor.view(carrier).numpy().view(dtype_of(tensor.dtype).numpy)
    except (RuntimeError, TypeError) as error:
        raise CaptureError("the memory of a tensor can't be reached", tensor=name or None, found=str(error)) from error


def _check_room(tensor: torch.Tensor, name: str) -> None:
    """See that a tensor's storage has all of it.

    Raises:
        CaptureError: it hasn't: who frees a tensor's memory for a while (FSDP does) leaves a tensor of the old shape over an empty storage.
    """
    if tensor.numel() == 0:
        return
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.itemsize
    try:
        room = tensor.untyped_storage().nbytes()
    except RuntimeError:  # there are devices whose tensors have none
        return
    if room < needed:
        raise CaptureError(
            "the memory of a tensor was freed",
            tensor=name or None,
            found=f"a storage of {room} bytes",
            expected=f"{needed} bytes",
            fix="save, or load, where the tensor has its memory, such as between two steps",
        )


def to_numpy(tensor: torch.Tensor, name: str) -> np.ndarray:
    """A tensor's values on the host, as a copy of their own.

    Raises:
        CaptureError: as `checked_dtype`.
    """
    checked_dtype(tensor, name)
    return _view(tensor.detach().cpu(), name).copy()


def to_tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of its own with the values of an array of the matching numpy type."""
    array = np.array(array, copy=True)
    carrier = _CARRIERS.get(dtype)
    if carrier is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(dtype_of(carrier).numpy)).view(dtype)


class TensorMemory(NamedTuple):
    """A tensor on the host as the memory of a shard. The view of it is made when it is asked for: small tensors can do without.

    Attributes:
        tensor: one that `checked_dtype` has passed.
    """

    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def host(self) -> np.ndarray | None:
        return _view(self.tensor, "")

    @property
    def address(self) -> int | None:
        tensor = self.tensor
        if not tensor.is_contiguous():
            return None
        # It may have been freed: see `_check_room`.
        first, room = tensor.storage_offset(), tensor.untyped_storage().nbytes()
        end = (first * tensor.itemsize if first else 0) + tensor.nbytes
        return tensor.data_ptr() if room >= end else None

    def read(self) -> np.ndarray:
        return _view(self.tensor, "")

    def write(self, region: Region, values: np.ndarray) -> None:
        _view(self.tensor, "")[region.slices] = values

    def hold(self) -> Memory:
        return TensorMemory(self.tensor.detach())

    def begin_copy(self, target: np.ndarray) -> None:
        target[...] = _view(self.tensor, "")


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of a shard that the host can't address: reading and writing copy.

    Attributes:
        tensor: a detached tensor on an accelerator.
    """

    tensor: torch.Tensor

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
        _check_room(self.tensor, "")
        return _view(self.tensor.cpu(), "")

    def write(self, region: Region, values: np.ndarray) -> None:
        with torch.no_grad():
            self.tensor[region.slices].copy_(to_tensor(values, self.tensor.dtype))

    def hold(self) -> Memory:
        return DeviceMemory(self.tensor.detach())

    def begin_copy(self, target: np.ndarray) -> Callable[[], object] | None:
        _check_room(self.tensor, "")
        return copy_to_host(self.tensor, _tensor_over(target, self.tensor.dtype))


@dataclass(frozen=True, slots=True)
class MirrorMemory:
    """Several memories of one rank that hold the same values: what is read comes from the first, what is written goes to all.

    A rank that runs the first and the last stage of a pipeline has a tied embedding twice.
    """

    memories: Sequence[Memory]

    @property
    def nbytes(self) -> int:
        return self.memories[0].nbytes

    @property
    def host(self) -> np.ndarray | None:
        return None

    @property
    def address(self) -> int | None:
        return None

    def read(self) -> np.ndarray:
        return self.memories[0].read()

    def write(self, region: Region, values: np.ndarray) -> None:
        for memory in self.memories:
            memory.write(region, values)

    def hold(self) -> Memory:
        return MirrorMemory([memory.hold() for memory in self.memories])

    def begin_copy(self, target: np.ndarray) -> Callable[[], object] | None:
        return self.memories[0].begin_copy(target)


def _tensor_over(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over an array of the matching numpy type: the same memory."""
    carrier = _CARRIERS.get(dtype)
    return torch.from_numpy(array) if carrier is None else torch.from_numpy(array.view(dtype_of(carrier).numpy)).view(dtype)
