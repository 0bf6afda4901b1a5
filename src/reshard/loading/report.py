"""What a load did, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reshard.format.common import CommonInfo
from reshard.loading.choice import PassedOver

# A table shows so many ranks, and so many names of a kind; the report has them all.
_RANKS_SHOWN = 16
_NAMES_SHOWN = 8

# The phases of a load, in their order; others come after them.
_PHASES = ("open", "plan", "read", "install")


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's part of a load.

    Attributes:
        rank: the global rank.
        bytes_needed: the bytes of the regions that it wanted.
        bytes_read: the bytes that it read of data files, gaps included.
        seconds: by phase: `open` (find the checkpoint, its catalog, and where in memory it belongs), `plan`, `read`, `install` (optimizers,
            schedulers, random states). Waiting for other ranks counts in the phase in which it happens.
        bytes_sent: the bytes that it read for other ranks and sent them, each time: in a balanced load, or to ranks of its machine.
        bytes_received: the bytes that other ranks sent it.
        bytes_verified: of the bytes that it read, how many were held against digests and found to be as they were saved.
        bytes_of_pages: of the whole pages on which lies what it copied out of mapped files; `bytes_read` has only what was copied.
    """

    rank: int
    bytes_needed: int
    bytes_read: int
    seconds: Mapping[str, float]
    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_verified: int = 0
    bytes_of_pages: int = 0

    @property
    def bytes_unverified(self) -> int:
        """The bytes that it read without knowing whether they are as they were saved: of row blocks that it didn't read whole, of strided
        boxes, of files without digests, gaps; all, when the load wasn't to verify.
        """
        return self.bytes_read - self.bytes_verified


@dataclass(frozen=True)
class RestoreReport:
    """What a load did. Names are those in files, and of the whole job; every rank has the same report.

    Attributes:
        directory: the iteration that was loaded.
        iteration: its number, None when the path doesn't say it.
        restored: the tensors that were restored, those that were cast among them.
        cast: the tensors that were converted, as `name: bfloat16 -> float32`.
        filled: tensors that the checkpoint lacks and that were made up from something else it has.
        missing: the run's tensors that the checkpoint lacks; they keep the run's values.
        unexpected: the checkpoint's tensors that the run lacks.
        mismatched: tensors that were left alone since shape or dtype differ.
        skipped: the tensors of the checkpoint and of the run that `only` and `exclude` left out.
        passed_over: the newer checkpoints that were not taken since they are damaged or unhealthy, newest first.
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
    cast: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    passed_over: tuple[PassedOver, ...] = ()

    @property
    def bytes_needed(self) -> int:
        """Over all ranks."""
        return sum(rank.bytes_needed for rank in self.ranks)

    @property
    def bytes_read(self) -> int:
        """Over all ranks."""
        return sum(rank.bytes_read for rank in self.ranks)

    @property
    def bytes_verified(self) -> int:
        """Over all ranks."""
        return sum(rank.bytes_verified for rank in self.ranks)

    @property
    def bytes_unverified(self) -> int:
        """Over all ranks."""
        return sum(rank.bytes_unverified for rank in self.ranks)

    @property
    def bytes_of_pages(self) -> int:
        """Over all ranks."""
        return sum(rank.bytes_of_pages for rank in self.ranks)

    @property
    def bytes_sent(self) -> int:
        """Over all ranks."""
        return sum(rank.bytes_sent for rank in self.ranks)

    def table(self) -> str:
        """The report as lines of text: tensors by what became of them; bytes and seconds by rank (in the last row bytes of all ranks, and
        the slowest rank's seconds); names, of each kind the first; notes.
        """
        which = "" if self.iteration is None else f"iteration {self.iteration} of "
        kinds = self._kinds()
        lines = [f"{which}{self.directory}: loaded in {self.seconds:.2f} s; random states {self.random}"]
        lines += [f"passed over {one}: {' '.join(one.details.split())}" for one in self.passed_over]
        lines.append("")
        lines += _columns([["restored", *kinds], [str(len(self.restored)), *(str(len(names)) for names in kinds.values())]])
        lines += ["", *_columns(self._rank_rows())]
        if len(self.ranks) > _RANKS_SHOWN:
            lines.append(f"({len(self.ranks) - _RANKS_SHOWN} more ranks are in `ranks`)")
        for kind, names in kinds.items():
            if names:
                more = f", … ({len(names)} in all)" if len(names) > _NAMES_SHOWN else ""
                lines += ["", f"{kind}: {', '.join(names[:_NAMES_SHOWN])}{more}"]
        if self.notes:
            lines += ["", *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)

    def _kinds(self) -> dict[str, tuple[str, ...]]:
        return {
            "cast": self.cast,
            "filled": self.filled,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "mismatched": self.mismatched,
            "skipped": self.skipped,
        }

    def _rank_rows(self) -> list[list[str]]:
        met = dict.fromkeys(phase for rank in self.ranks for phase in rank.seconds)
        phases = [*(phase for phase in _PHASES if phase in met), *(phase for phase in met if phase not in _PHASES)]
        moved = [("needed", "bytes_needed"), ("read", "bytes_read"), ("verified", "bytes_verified"), ("unverified", "bytes_unverified")]
        if self.bytes_of_pages:
            moved.append(("pages", "bytes_of_pages"))
        if self.bytes_sent:
            moved += [("sent", "bytes_sent"), ("received", "bytes_received")]
        rows = [["rank", *(word for word, _ in moved), *(f"{phase} s" for phase in phases)]]
        for rank in self.ranks[:_RANKS_SHOWN]:
            seconds = [f"{rank.seconds.get(phase, 0.0):.3f}" for phase in phases]
            rows.append([str(rank.rank), *(_size(getattr(rank, field)) for _, field in moved), *seconds])
        slowest = [f"{max((rank.seconds.get(phase, 0.0) for rank in self.ranks), default=0.0):.3f}" for phase in phases]
        return [*rows, ["all", *(_size(sum(getattr(rank, field) for rank in self.ranks)) for _, field in moved), *slowest]]

    def __str__(self) -> str:
        which = self.directory if self.iteration is None else f"iteration {self.iteration}"
        line = (
            f"{which}: {len(self.restored)} tensors restored, {_size(self.bytes_needed)} needed, {_size(self.bytes_read)} read by "
            f"{len(self.ranks)} rank{'' if len(self.ranks) == 1 else 's'} in {self.seconds:.2f} s, {_size(self.bytes_verified)} verified"
        )
        if self.bytes_sent:
            line += f", {_size(self.bytes_sent)} sent from rank to rank"
        for label, names in self._kinds().items():
            if names:
                line += f"; {len(names)} {label}"
        if self.passed_over:
            line += f"; passed over {', '.join(map(str, self.passed_over))}"
        return line + f"; random states {self.random}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, each column flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
