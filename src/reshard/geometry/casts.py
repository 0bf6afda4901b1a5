"""Values of one floating type become values of another."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from reshard.geometry.dtypes import DType

# The types between which a cast is a rounding of numbers. A cast of integers, truth values or complex numbers changes what they mean.
_FLOATING = frozenset({"float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"})

_E4M3_MAX = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)


def can_cast(stored: str, wanted: str) -> bool:
    """Whether a load can convert one type into the other, by their names: both are floating types."""
    return stored in _FLOATING and wanted in _FLOATING


def cast_values(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Values in another floating type, as torch's `.to()` makes them.

    Rounding is to the nearest, ties to even. What is beyond the range of the new type becomes infinite, but in float8_e4m3fn, which has
    no infinity, the largest number. A NaN stays one; its payload may not.

    Args:
        values: of any shape and strides.
        dtype: the new type.
    """
    target = dtype.numpy
    with np.errstate(all="ignore"):
        if values.dtype != np.float32 and target not in (np.float32, np.float64):
            # As torch does. It matters for float64, which is rounded twice on its way to two bytes.
            values = values.astype(np.float32)
        if target == ml_dtypes.float8_e4m3fn:
            values = np.clip(values, -_E4M3_MAX, _E4M3_MAX)
        return values.astype(target)
