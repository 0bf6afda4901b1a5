"""The element types that a checkpoint can hold, under the names of every party."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import ml_dtypes
import numpy as np

from reshard.errors import UsageError


@dataclass(frozen=True)
class DType:
    """An element type.

    Attributes:
        name: the name here, in messages and in code (`bfloat16`); PyTorch's and numpy's name wherever they have one.
        safetensors: its code in a safetensors header (`BF16`).
        mindspore: its name in the contract's `metadata.json` (`BFloat16`).
        numpy: its numpy type (of ml_dtypes where numpy has none).
    """

    name: str
    safetensors: str
    mindspore: str
    numpy: np.dtype

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.numpy.itemsize

    def __str__(self) -> str:
        return self.name


ALL: tuple[DType, ...] = (
    DType("bool", "BOOL", "Bool", np.dtype(np.bool_)),
    DType("uint8", "U8", "UInt8", np.dtype(np.uint8)),
    DType("int8", "I8", "Int8", np.dtype(np.int8)),
    DType("uint16", "U16", "UInt16", np.dtype(np.uint16)),
    DType("int16", "I16", "Int16", np.dtype(np.int16)),
    DType("uint32", "U32", "UInt32", np.dtype(np.uint32)),
    DType("int32", "I32", "Int32", np.dtype(np.int32)),
    DType("uint64", "U64", "UInt64", np.dtype(np.uint64)),
    DType("int64", "I64", "Int64", np.dtype(np.int64)),
    DType("float8_e4m3fn", "F8_E4M3", "Float8E4M3FN", np.dtype(ml_dtypes.float8_e4m3fn)),
    DType("float8_e5m2", "F8_E5M2", "Float8E5M2", np.dtype(ml_dtypes.float8_e5m2)),
    DType("float16", "F16", "Float16", np.dtype(np.float16)),
    DType("bfloat16", "BF16", "BFloat16", np.dtype(ml_dtypes.bfloat16)),
    DType("float32", "F32", "Float32", np.dtype(np.float32)),
    DType("float64", "F64", "Float64", np.dtype(np.float64)),
    DType("complex64", "C64", "Complex64", np.dtype(np.complex64)),
)


@cache
def _by(attribute: str) -> Mapping[object, DType]:
    def key(dtype: DType) -> object:
        value = getattr(dtype, attribute)
        return value.lower() if attribute == "mindspore" else value

    return MappingProxyType({key(dtype): dtype for dtype in ALL})


def _find(attribute: str, value: object, key: object) -> DType:
    found = _by(attribute).get(key)
    if found is None:
        raise UsageError(f"an element type that checkpoints don't hold: {value}", found=value, expected=", ".join(d.name for d in ALL))
    return found


def by_name(name: str) -> DType:
    """The type of this name (`float32`). Raises UsageError for one that checkpoints don't hold."""
    return _find("name", name, name)


def by_numpy(dtype: np.dtype) -> DType:
    """The type of a numpy array in native byte order. Raises UsageError for one that checkpoints don't hold."""
    return _find("numpy", dtype, np.dtype(dtype))


def by_safetensors(code: str) -> DType:
    """The type of a code in a safetensors header (`F32`). Raises UsageError for one that checkpoints don't hold."""
    return _find("safetensors", code, code)


def by_mindspore(name: str) -> DType | None:
    """The type of a name in `metadata.json`, in any case; None for an unknown one, as the contract says."""
    return _by("mindspore").get(name.lower())
