"""Torch tensors inside trees of values: as the extras hold them, and back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from reshard.errors import CaptureError
from reshard.format.extra import FrameworkArray
from reshard.frameworks.torch.memory import dtype_of, to_numpy, to_tensor, torch_dtype
from reshard.frameworks.torch.placements import is_dtensor
from reshard.geometry.dtypes import by_name

FRAMEWORK = "torch"


def to_value(value: Any, path: str = "") -> Any:
    """A tree with every tensor in it replaced by a copy of its values on the host, and `torch.Size` by a tuple.

    Args:
        value: dictionaries, lists and tuples; anything else passes unchanged.
        path: what to call the tree in errors.

    Raises:
        CaptureError: a DTensor, or a tensor that checkpoints can't hold; named by its path in the tree.
    """
    if isinstance(value, torch.Tensor):
        if is_dtensor(value):
            raise CaptureError(
                "a DTensor among values: every rank has another part of it",
                field=path or "the whole tree",
                fix="give its full_tensor(), or make it a part of the model or the optimizer",
            )
        array = to_numpy(value, path)
        return FrameworkArray(FRAMEWORK, dtype_of(value.dtype).name, array)
    if type(value) is torch.Size:
        return tuple(value)
    return _map(value, path, to_value)


def from_value(value: Any, path: str = "") -> Any:
    """The inverse of `to_value`: tensors on the host. An array of another framework becomes a tensor too."""
    if isinstance(value, FrameworkArray):
        return to_tensor(value.array, torch_dtype(by_name(value.dtype)))
    return _map(value, path, from_value)


def _map(value: Any, path: str, function: Callable[[Any, str], Any]) -> Any:
    kind = type(value)
    if kind in (dict, OrderedDict):
        return kind((key, function(item, f"{path}[{key!r}]" if path else str(key))) for key, item in value.items())
    if kind in (list, tuple):
        return kind(function(item, f"{path}[{index}]") for index, item in enumerate(value))
    return value
