"""MindSpore tensors inside trees of values: as the extras hold them, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore
import numpy as np

from reshard.format.extra import FrameworkArray
from reshard.frameworks.mindspore.memory import array_of, checked_dtype, to_tensor
from reshard.geometry.dtypes import by_name

FRAMEWORK = "mindspore"


def to_value(value: Any, path: str = "") -> Any:
    """A tree with every tensor in it replaced by a copy of its values on the host.

    Args:
        value: dictionaries, lists and tuples; anything else passes unchanged.
        path: what to call the tree in errors.

    Raises:
        CaptureError: a tensor that checkpoints can't hold, named by its path in the tree.
    """
    if isinstance(value, mindspore.Tensor):
        dtype = checked_dtype(value, path)
        return FrameworkArray(FRAMEWORK, dtype.name, np.array(array_of(value), copy=True))
    return _map(value, path, to_value)


def from_value(value: Any, path: str = "") -> Any:
    """The inverse of `to_value`. An array of another framework becomes a tensor too."""
    if isinstance(value, FrameworkArray):
        return to_tensor(value.array, by_name(value.dtype))
    return _map(value, path, from_value)


def _map(value: Any, path: str, function: Callable[[Any, str], Any]) -> Any:
    kind = type(value)
    if isinstance(value, dict):
        return kind((key, function(item, f"{path}[{key!r}]" if path else str(key))) for key, item in value.items())
    if kind in (list, tuple):
        return kind(function(item, f"{path}[{index}]") for index, item in enumerate(value))
    return value
