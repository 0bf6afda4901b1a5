"""What `reshard prune` does: a plan as data, and carrying it out."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reshard.cli.listing import COMMITTED, UNHEALTHY, IterationLine, list_root
from reshard.errors import CheckpointNotFoundError, StorageError, UsageError
from reshard.format.names import REPLACED_PREFIX, TRACKER_FILE, iteration_name, parse_iteration_name
from reshard.saving.policies import KeepPolicy
from reshard.saving.retention import choose_expired, in_order, remove_iterations, survey
from reshard.saving.root import DELETING_PREFIX, LOCK_FILE, deleting_name, is_leftover, open_root, take_lock
from reshard.sources.resolve import list_iterations, resolve
from reshard.storage import Storage
from reshard.storage.storage import join

# A run that is just ending lets go of its root within this (seconds); whoever prunes doesn't want to wait for one that goes on.
PATIENCE = 1.0


@dataclass(frozen=True)
class PruneLine:
    """What becomes of one thing in a root.

    Attributes:
        iteration: its number.
        directory: its name.
        nbytes: the bytes of its files.
        files: the number of its files.
        modified: when it was committed, or last written; seconds since the epoch.
        kind: a committed `checkpoint`; a `leftover` of a run that died; or `other`, which is never touched.
        goes: whether it is removed.
        reason: why it goes or stays, in words.
    """

    iteration: int
    directory: str
    nbytes: int
    files: int
    modified: float
    kind: Literal["checkpoint", "leftover", "other"]
    goes: bool
    reason: str


@dataclass(frozen=True)
class PrunePlan:
    """What pruning a root would do.

    Attributes:
        root: its path.
        tracked: the iteration that a run resumes from; None when there is none.
        holder: the run that holds the root, in its own words; None when none does.
        lines: oldest first.
    """

    root: str
    tracked: int | None
    holder: str | None
    lines: tuple[PruneLine, ...]

    @property
    def going(self) -> tuple[PruneLine, ...]:
        """The lines of what goes."""
        return tuple(line for line in self.lines if line.goes)

    @property
    def freed(self) -> int:
        """The bytes of what goes."""
        return sum(line.nbytes for line in self.going)


def plan_prune(storage: Storage, root: str, policy: KeepPolicy | None, now: float, holder: str | None = None) -> PrunePlan:
    """Look at a root, and say what would be removed. Changes nothing.

    What stays whatever the policy says: the tracker's checkpoint, or without a tracker the newest; when that one is damaged as far as names
    and sizes tell, or unhealthy, also the last one that is neither; and everything that isn't recognised.

    Args:
        storage: where it lies.
        root: its path.
        policy: what is kept of the committed checkpoints; None for all of them.
        now: seconds since the epoch.
        holder: who holds the root: then nothing is a dead run's.

    Raises:
        CheckpointNotFoundError: there is nothing of a checkpoint.
        TrackerError: the tracker is damaged: which one a run resumes from isn't known.
        StorageError: the storage refuses.
    """
    listing = list_root(storage, root)
    directories = dict(list_iterations(storage, root))
    names = {os.path.basename(directory) for directory in directories.values()}
    tracked = _tracked(storage, root) if directories or storage.stat(join(root, TRACKER_FILE)) is not None else None
    stays = {} if tracked is None else {tracked: "the tracker names it" if listing.tracker == tracked else "a run resumes from it"}
    gone: set[int] = set()
    if policy is not None and tracked is not None:
        iterations = survey(storage, directories.items(), with_metrics=policy.needs_metrics)
        ordered = [iteration.step for iteration in in_order(iterations, tracked)]
        refuge = _refuge({line.iteration: line for line in listing.iterations if line.directory in names}, ordered)
        if refuge is not None:
            stays.setdefault(refuge, "the last one that is intact, as far as names and sizes tell, and not unhealthy")
        gone = set(choose_expired(iterations, policy, tracked, set(stays), now))
    kept = "nothing says what to keep" if policy is None else "kept"
    lines = []
    for line in listing.iterations:
        if line.directory in names:
            goes = line.iteration in gone
            reason = "nothing keeps it" if goes else stays.get(line.iteration, kept)
            lines.append(_line(line, "checkpoint", goes, reason))
        elif is_leftover(line.directory) or _is_replaced(line.directory, names):
            goes = holder is None
            lines.append(_line(line, "leftover", goes, _origin(line.directory) if goes else "the run that holds the root may need it"))
        else:
            lines.append(_line(line, "other", False, "not recognised"))
    return PrunePlan(root, tracked, holder, tuple(lines))


def _tracked(storage: Storage, root: str) -> int | None:
    try:
        return resolve(storage, root).iteration
    except CheckpointNotFoundError:
        return None


def _refuge(lines: dict[int, IterationLine], ordered: Sequence[int]) -> int | None:
    intact = [step for step in reversed(ordered) if step in lines and lines[step].state == COMMITTED]
    return next((step for step in intact if lines[step].health != UNHEALTHY), intact[0] if intact else None)


def _is_replaced(name: str, committed: set[str]) -> bool:
    """Whether a directory is the old one of an iteration that was saved again."""
    replaced = name.removeprefix(REPLACED_PREFIX)
    return replaced != name and parse_iteration_name(replaced) is not None and replaced in committed


def _origin(name: str) -> str:
    if name.startswith(REPLACED_PREFIX):
        return "a newer save of the same step has taken its place"
    return f"a run died while it {'removed' if name.startswith(DELETING_PREFIX) else 'saved'} it"


def _line(line: IterationLine, kind: Literal["checkpoint", "leftover", "other"], goes: bool, reason: str) -> PruneLine:
    return PruneLine(line.iteration, line.directory, line.nbytes, line.files, line.modified, kind, goes, reason)


def holder_of(storage: Storage, root: str) -> str | None:
    """Who holds a root; None when nobody does, or when that can't be seen (a root that can only be read). Changes nothing.

    Raises:
        StorageError: the storage refuses to look.
    """
    path = join(root, LOCK_FILE)
    if storage.stat(path) is None:
        return None
    try:
        taken = storage.lock(path, f"process {os.getpid()} on host {socket.gethostname()}, looking whether somebody else holds it")
    except StorageError:
        return None
    if isinstance(taken, str):
        return taken
    taken.release()
    return None


def check_unlocked(storage: Storage, root: str) -> None:
    """See that no run holds a root, waiting a moment for one that ends.

    Raises:
        RootLockedError: one does.
        StorageError: the storage refuses.
    """
    take_lock(storage, root, PATIENCE).release()


def carry_out(storage: Storage, plan: PrunePlan, policy: KeepPolicy | None, now: float) -> None:
    """Remove what a plan says goes, with the root locked.

    Args:
        storage: where it lies.
        plan: made a moment ago.
        policy: the one that it was made with.
        now: likewise.

    Raises:
        RootLockedError: a run holds the root by now.
        UsageError: the root has changed since.
        StorageError: something can't be removed.
    """
    wanted = _steps(plan)
    # It removes what dead runs left, too.
    lock = open_root(storage, plan.root, PATIENCE)
    try:
        again = plan_prune(storage, plan.root, policy, now)
        if (again.tracked, _steps(again)) != (plan.tracked, wanted):
            raise UsageError(
                "the root has changed since it was looked at; nothing was removed", file=plan.root, fix="run the command again"
            )
        mark = f"{secrets.token_hex(4)}-0"
        removed = remove_iterations(storage, plan.root, wanted, mark)
        leftovers = {line.directory for line in plan.going if line.kind == "leftover"} | {deleting_name(step, mark) for step in removed}
        stuck = [iteration_name(step) for step in wanted if step not in removed]
        stuck += [entry.name for entry in storage.list(plan.root) if entry.name in leftovers]
    finally:
        lock.release()
    if stuck:
        raise StorageError("not all of it could be removed", file=plan.root, found=", ".join(stuck), fix="the warnings above say why")


def _steps(plan: PrunePlan) -> list[int]:
    return [line.iteration for line in plan.going if line.kind == "checkpoint"]
