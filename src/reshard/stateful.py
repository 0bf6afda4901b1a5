"""What a training loop hands over besides model and optimizer: objects with `state_dict`, or values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from reshard.errors import MismatchError, UsageError


def values_of(part: Any) -> Any:
    """The values of a scheduler, data loader or extra: its `state_dict()`, or itself; lists and dictionaries of such are taken apart."""
    if hasattr(part, "state_dict"):
        return values_of(part.state_dict())
    if isinstance(part, Mapping):
        return {key: values_of(value) for key, value in part.items()}
    if isinstance(part, list):
        return [values_of(value) for value in part]
    if type(part) is tuple:
        return tuple(values_of(value) for value in part)
    return part


def values_of_parts(parts: Mapping[str, Any], to_value: Callable[[Any], Any]) -> dict[str, Any]:
    """The values of several parts of a run by their names, without those that are None.

    Args:
        parts: as `values_of` takes them.
        to_value: makes values of a framework's objects.
    """
    return {name: to_value(values_of(part)) for name, part in parts.items() if part is not None}


def restore_values(part: Any, value: Any, name: str) -> None:
    """Give an object (or a list or dictionary of objects) the values that `values_of` took from its like.

    Args:
        part: has `load_state_dict`, or is a list or dictionary of such; other members are left alone.
        value: what was saved.
        name: what to call it in an error.

    Raises:
        UsageError: it can't take values.
        MismatchError: the saved values have another shape of lists and dictionaries.
    """
    if not _restore(part, value, name):
        raise UsageError(
            "an object that can't take back what was saved",
            field=name,
            found=type(part).__name__,
            expected="an object with load_state_dict, or a list or dictionary of such",
            fix="values come back in the report: report.extra",
        )


def _restore(part: Any, value: Any, name: str) -> bool:
    if hasattr(part, "load_state_dict"):
        part.load_state_dict(value)
        return True
    if isinstance(part, Mapping):
        if not isinstance(value, Mapping) or not set(part) <= set(value):
            raise MismatchError(
                "the checkpoint doesn't have these values",
                field=name,
                found=sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__,
                expected=sorted(map(str, part)),
            )
        pairs = [(item, value[key], f"{name}.{key}") for key, item in part.items()]
    elif isinstance(part, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(part):
            raise MismatchError(
                "the checkpoint has another number of values",
                field=name,
                found=len(value) if isinstance(value, list | tuple) else type(value).__name__,
                expected=len(part),
            )
        pairs = [(item, old, f"{name}[{index}]") for index, (item, old) in enumerate(zip(part, value, strict=True))]
    else:
        return False
    taken = [_restore(*pair) for pair in pairs]
    return any(taken)
