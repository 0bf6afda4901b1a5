"""What a pickle may name, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from reshard.errors import DataFileError


@dataclass(frozen=True, slots=True)
class Word:
    """A name of the list that a pickle mentions: `torch.float32`. A word and nothing else: it leads to no object of Python.

    Attributes:
        name: module and name, joined by a dot.
    """

    name: str


@dataclass(slots=True, eq=False)
class Record:
    """An object that a pickle describes, as far as it does: nothing was made of it.

    Attributes:
        name: of its class, as in a `Word`.
        arguments: what the class was to be called with.
        fields: its state, when that is named.
        state: its state, when it is something else.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    state: Any = None


@dataclass(frozen=True)
class Vocabulary:
    """What a pickle may name.

    Attributes:
        functions: what is done for a name that is called; each checks its arguments, and raises ValueError when it can't take them.
        records: names of classes whose objects become records.
        words: names that are values themselves.
        persistent: what a persistent id stands for; None when there may be none.
    """

    functions: Mapping[str, Callable[[tuple[Any, ...]], Any]] = field(default_factory=dict)
    records: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()
    persistent: Callable[[Any], Any] | None = None

    def knows(self, name: str) -> bool:
        """Whether a pickle may mention a name."""
        return name in self.functions or name in self.records or name in self.words


class UnknownNameError(DataFileError):
    """A pickle names something that isn't on the list."""
