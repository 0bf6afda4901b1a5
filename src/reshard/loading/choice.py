"""Which checkpoint a load takes: the one that its path means, or an older one when that is damaged or unhealthy and the caller says so.

All of it happens on one rank, for all.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from reshard.errors import (
    DAMAGE,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    ReshardError,
    TrackerError,
    UsageError,
)
from reshard.format.common import is_unhealthy, read_common
from reshard.format.names import COMMON_FILE, TRACKER_FILE
from reshard.format.tracker import read_tracker
from reshard.sources.legacy.saved_under import GivenStrategy
from reshard.sources.pytorch.naming import Prefixes
from reshard.sources.relay import Relayed, read_for_all
from reshard.sources.resolve import Resolved, latest, list_iterations, resolve
from reshard.storage import Storage
from reshard.storage.storage import join
from reshard.verification.glance import check_at_a_glance

OnCorrupt = Literal["error", "fallback"]


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that a load did not take, though it is newer than the one that it took.

    Attributes:
        iteration: its number; None when a tracker is damaged, so that nobody knows.
        path: its directory, or the tracker.
        reason: `damaged` or `unhealthy`.
        details: what was wrong, in words.
    """

    iteration: int | None
    path: str
    reason: Literal["damaged", "unhealthy"]
    details: str

    def __str__(self) -> str:
        what = "the tracker" if posixpath.basename(self.path) == TRACKER_FILE else f"iteration {self.iteration}"
        return f"{what} ({self.reason})"


@dataclass(frozen=True)
class Rules:
    """Which checkpoints may be taken; the same on every rank.

    Attributes:
        missing_ok: whether none at all is fine.
        on_corrupt: what is done about a damaged one: `error`, or `fallback` to the newest older one that is intact.
        skip_unhealthy: whether an unhealthy one gives way to the newest older one that isn't.
        prefixes: where model and optimizer begin in the keys of a checkpoint of PyTorch.
        strategy: under which it was saved, where it doesn't say so itself; rank 0's counts.
    """

    missing_ok: bool = False
    on_corrupt: OnCorrupt = "error"
    skip_unhealthy: bool = False
    prefixes: Prefixes = Prefixes()  # noqa: RUF009 - frozen
    strategy: GivenStrategy | None = None


@dataclass(frozen=True)
class Choice:
    """A checkpoint to load.

    Attributes:
        resolved: where it lies.
        relayed: what was read of it for all ranks.
        passed_over: the newer ones that were not taken, newest first.
        falls_back: whether an older one is to be taken when it turns out to be damaged.
    """

    resolved: Resolved
    relayed: Relayed
    passed_over: tuple[PassedOver, ...]
    falls_back: bool


def choose(storage: Storage, path: str, rules: Rules, *, balanced: bool, passed_over: Sequence[PassedOver] = ()) -> Choice | None:
    """The checkpoint to load; None when there is none and that is fine.

    Args:
        storage: where it lies.
        path: a root or one iteration.
        rules: which may be taken.
        balanced: as in `read_for_all`.
        passed_over: those that turned out to be damaged so far; the one to take is older than the last.

    Raises:
        UsageError: rules that can't be.
        CheckpointNotFoundError: there is none, or all are unhealthy.
        DamagedCheckpointError: it is damaged, or none is left that isn't.
        StorageError: the storage refuses.
    """
    if rules.on_corrupt not in ("error", "fallback"):
        raise UsageError("nothing that can be done", field="on_corrupt", found=repr(rules.on_corrupt), expected="'error' or 'fallback'")
    falls_back = rules.on_corrupt == "fallback"
    passed = list(passed_over)
    candidates = None
    if not passed:
        try:
            first = latest(storage, path) if rules.missing_ok else resolve(storage, path)
        except TrackerError as error:
            if not falls_back:
                raise
            tracker = join(path, TRACKER_FILE)
            passed.append(PassedOver(_named_by(storage, path), tracker, "damaged", str(error)))
        else:
            if first is None:
                return None
            candidates = _from(storage, first)
    for candidate in candidates if candidates is not None else _below(storage, passed[-1]):
        try:
            relayed = read_for_all(storage, candidate.directory, balanced=balanced, prefixes=rules.prefixes, strategy=rules.strategy)
            common = read_common(storage, join(candidate.directory, COMMON_FILE)) if rules.skip_unhealthy else None
        except CheckpointNotFoundError:
            # A run that saves may just have removed an old one.
            if not passed:
                raise
            continue
        except DAMAGE as error:
            if not falls_back:
                raise
            passed.append(PassedOver(candidate.iteration, candidate.directory, "damaged", str(error)))
            continue
        if not is_unhealthy(common):
            return Choice(candidate, relayed, tuple(passed), falls_back)
        details = f"ckpt_status {common.ckpt_status if common else None}"
        passed.append(PassedOver(candidate.iteration, candidate.directory, "unhealthy", f"{details} in {COMMON_FILE}"))
    raise _none_left(path, passed)


def _from(storage: Storage, first: Resolved) -> Iterator[Resolved]:
    yield first
    if first.root is not None:
        yield from older(storage, first.root, first.iteration)


def _below(storage: Storage, last: PassedOver) -> Iterator[Resolved]:
    """What is left after one that was passed over; nothing when it has no number, and so no place in a root."""
    root, name = posixpath.split(last.path)
    if name == TRACKER_FILE or last.iteration is not None:
        yield from older(storage, root, last.iteration)


def older(storage: Storage, root: str, than: int | None) -> Iterator[Resolved]:
    """The committed iterations of a root below a number (None: all), newest first."""
    for step, directory in reversed(list_iterations(storage, root)):
        if than is None or step < than:
            yield Resolved(directory, step, root)


def _named_by(storage: Storage, root: str) -> int | None:
    """The iteration that a damaged tracker names, as far as it can be read."""
    try:
        return read_tracker(storage, join(root, TRACKER_FILE))
    except TrackerError:
        return None


def _none_left(path: str, passed: Sequence[PassedOver]) -> ReshardError:
    each = "\n".join(f"    {one}: " + one.details.replace("\n", "\n      ") for one in passed)
    if any(one.reason == "damaged" for one in passed):
        what, fix = "no intact checkpoint is left", "`reshard verify ROOT --all` says what is wrong; restore files from a copy"
        return DamagedCheckpointError(f"{what}; passed over:\n{each}", file=path, fix=fix)
    fix = "give the path of an iteration without skip_unhealthy, or begin afresh"
    return CheckpointNotFoundError(f"no healthy checkpoint is left; passed over:\n{each}", file=path, fix=fix)


def words_of_refuge(storage: Storage, path: str) -> str:
    """What can be loaded in place of a damaged checkpoint, for its error; empty when the path says no more than the one.

    Args:
        storage: where it lies.
        path: as in `choose`.

    Raises:
        StorageError: the storage refuses.
    """
    try:
        first = resolve(storage, path)
        root, than = first.root, first.iteration
    except TrackerError:
        root, than = path, _named_by(storage, path)
    if root is None:
        return ""
    for candidate in older(storage, root, than):
        try:
            check_at_a_glance(storage, candidate.directory)
        except ReshardError:
            continue
        return (
            f"iteration {candidate.iteration} is the newest intact one{'' if than is None else ' before it'}, as far as seal, metadata, "
            f"headers and sizes tell (data not read); load it by its path, {candidate.directory}, or with on_corrupt='fallback'"
        )
    return "no older iteration in its root"
