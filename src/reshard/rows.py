"""Named tuples by the thousand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any, TypeVar

T = TypeVar("T", bound=tuple[Any, ...])


def rows(kind: type[T], *columns: Iterable[Any]) -> Iterator[T]:
    """Named tuples of one type, a column for each of their fields; as many as the shortest column has rows.

    To call the type itself is to call a function of Python, which costs three times as much: states have 100,000 tensors, and a load makes
    several named tuples of each.
    """
    assert len(columns) == len(kind._fields)  # type: ignore[attr-defined]  # named tuples have no type of their own
    return map(tuple.__new__, repeat(kind), zip(*columns, strict=False))
