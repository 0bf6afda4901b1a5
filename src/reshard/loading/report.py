"""What a load did, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reshard.format.common import CommonInfo


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's part of a load.

    Attributes:
        rank: the global rank.
        bytes_needed: the bytes of the regions that it wanted.
        bytes_read: the bytes that it read of data files, gaps included.
        seconds: by phase: `plan`, `read`.
    """

    rank: int
    bytes_needed: int
    bytes_read: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class RestoreReport:
    """What a load did. Names are those in files, and of the whole job; every rank has the same report.

    Attributes:
        directory: the iteration that was loaded.
        iteration: its number, None when the path doesn't say it.
        restored: the tensors that were restored.
        filled: tensors that the checkpoint lacks and that were made up from something else it has.
        missing: the run's tensors that the checkpoint lacks; they keep the run's values.
        unexpected: the checkpoint's tensors that the run lacks.
        mismatched: tensors that were left alone since shape or dtype differ.
        random: what became of the random states: `restored`, `reseeded` or `untouched`.
        ranks: every rank's part.
        common: the training information of the iteration, None when it has none.
        extra: the values of `extra` that were saved.
        notes: what else there is to know.
        seconds: how long it took, the slowest rank.
    """

    directory: str
    iteration: int | None
    restored: tuple[str, ...]
    filled: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    random: str
    ranks: tuple[RankReport, ...]
    common: CommonInfo | None
    extra: Any = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def bytes_needed(self) -> int:
        """Over all ranks."""
        return sum(rank.bytes_needed for rank in self.ranks)

    @property
    def bytes_read(self) -> int:
        """Over all ranks."""
        return sum(rank.bytes_read for rank in self.ranks)

    def __str__(self) -> str:
        which = self.directory if self.iteration is None else f"iteration {self.iteration}"
        line = (
            f"{which}: {len(self.restored)} tensors restored, {_size(self.bytes_needed)} needed, {_size(self.bytes_read)} read by "
            f"{len(self.ranks)} rank{'' if len(self.ranks) == 1 else 's'} in {self.seconds:.2f} s"
        )
        for label, names in (
            ("filled", self.filled),
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("mismatched", self.mismatched),
        ):
            if names:
                line += f"; {len(names)} {label}"
        return line + f"; random states {self.random}"


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
