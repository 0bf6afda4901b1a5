"""What a root holds, as data: every iteration, committed or not, and in which state it is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from reshard.checkpoint import Checkpoint
from reshard.cli.layouts import tensor_ranks
from reshard.errors import CheckpointNotFoundError, DamagedCheckpointError, ReshardError, StorageError, TrackerError, UsageError
from reshard.format.common import CommonInfo, is_unhealthy
from reshard.format.names import COMMON_FILE, METADATA_FILE, REPLACED_PREFIX, TRACKER_FILE, parse_iteration_name
from reshard.format.seal import SEAL_FILE
from reshard.format.tracker import read_tracker
from reshard.saving.root import DELETING_PREFIX
from reshard.sources.pytorch.dcp_metadata import DCP_METADATA_FILE
from reshard.sources.resolve import list_iterations
from reshard.storage import Storage
from reshard.storage.storage import join
from reshard.verification.glance import measure, missing_data, missing_files

COMMITTED = "committed"
TORN = "torn"
DAMAGED = "damaged"

HEALTHY = "healthy"
UNHEALTHY = "unhealthy"

# The step in the name of a checkpoint of PyTorch: `step-100`, `checkpoint_100`, `100`.
_NUMBER_AT_END = re.compile(r"(\d{1,15})$", re.ASCII)

# Names under which a save works before its commit, or keeps what it is about to replace, have the iteration's name in them.
_UNCOMMITTED = re.compile(r".*iteration_(\d{8,18})(?!\d).*", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class IterationLine:
    """What a root holds of one iteration.

    Attributes:
        iteration: its number.
        directory: the directory's name.
        state: `committed`; `torn` (its save didn't finish, or still goes on; loading never takes it); `damaged` (loading would fail).
        problem: what is wrong with it.
        tracked: whether the tracker names it: the one that a run resumes from.
        global_step: the optimizer's step count, as `common.json` says.
        nbytes: the bytes of all its files.
        files: the number of its files.
        world_size: the number of ranks that saved it; None when that isn't known.
        modified: when it was committed, or last written; seconds since the epoch.
        health: `healthy` or `unhealthy`, as `common.json` says; None when it doesn't.
        metrics: the numbers that were saved with it.
    """

    iteration: int
    directory: str
    state: str
    problem: str | None
    tracked: bool
    global_step: int | None
    nbytes: int
    files: int
    world_size: int | None
    modified: float
    health: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RootListing:
    """What a root holds.

    Attributes:
        root: its path.
        tracker: the iteration that the tracker names, None when it names none.
        tracker_problem: what is wrong with the tracker, None when nothing is.
        iterations: oldest first.
        is_foreign: whether they are checkpoints of torch.distributed.checkpoint, which have no tracker, and names that their runs chose.
    """

    root: str
    tracker: int | None
    tracker_problem: str | None
    iterations: tuple[IterationLine, ...]
    is_foreign: bool = False


def list_root(storage: Storage, root: str) -> RootListing:
    """What a root holds, committed or not; of a directory that is none, the checkpoints of torch.distributed.checkpoint in it.

    Raises:
        CheckpointNotFoundError: there is nothing of a checkpoint.
    """
    entry = storage.stat(root)
    if entry is None or not entry.is_directory:
        raise CheckpointNotFoundError(
            "there is no such directory" if entry is None else "a checkpoint root is a directory, and this is a file",
            file=root,
            fix="give the directory that holds iteration_… and the tracker",
        )
    tracker, problem = _read_tracker(storage, root)
    committed = list_iterations(storage, root)
    known = {os.path.basename(directory) for _, directory in committed}
    found = [
        _unless_gone(storage, directory, lambda step=step, directory=directory: _committed_line(storage, step, directory, tracker))
        for step, directory in committed
    ]
    for child in storage.list(root):
        match = _UNCOMMITTED.fullmatch(child.name)
        if match is not None and child.is_directory and child.name not in known:
            path = join(root, child.name)
            found.append(_unless_gone(storage, path, lambda path=path, step=int(match[1]): _torn_line(storage, path, step, tracker)))
    lines = [line for line in found if line is not None]
    if not lines and tracker is None and problem is None:
        here = any(storage.stat(join(root, name)) is not None for name in (METADATA_FILE, COMMON_FILE, DCP_METADATA_FILE))
        foreign = [] if here else _foreign_lines(storage, root)
        if foreign:
            return RootListing(root, None, None, tuple(foreign), is_foreign=True)
        raise CheckpointNotFoundError(
            "there is no checkpoint in this directory",
            file=root,
            expected="directories iteration_… and the tracker",
            fix="this is one checkpoint, not a root: use `reshard show`" if here else "give the directory that a run saves to",
        )
    if tracker is not None and not any(line.tracked for line in lines):
        problem = f"it names iteration {tracker}, which isn't here"
    lines.sort(key=lambda line: (line.iteration, line.state != COMMITTED, line.directory))
    return RootListing(root, tracker, problem, tuple(lines))


def _foreign_lines(storage: Storage, root: str) -> list[IterationLine]:
    """The checkpoints of torch.distributed.checkpoint that lie side by side in a directory. Each exists when its `.metadata` does."""
    lines: list[IterationLine] = []
    for child in storage.list(root):
        directory = join(root, child.name)
        if not child.is_directory or storage.stat(join(directory, DCP_METADATA_FILE)) is None:
            continue
        number = _NUMBER_AT_END.search(child.name)
        step = 0 if number is None else int(number[1])
        line = _unless_gone(storage, directory, lambda step=step, directory=directory: _foreign_line(storage, step, directory))
        if line is not None:
            lines.append(line)
    return sorted(lines, key=lambda line: (line.iteration, line.directory))


def _foreign_line(storage: Storage, step: int, directory: str) -> IterationLine:
    try:
        return _committed_line(storage, step, directory, None)
    except UsageError as error:
        # Whole as it is: which part of it is the model's has yet to be said.
        sizes, written = measure(storage, directory)
        words = f"{_one_line(error)}: {error.field}"
        return IterationLine(
            step, os.path.basename(directory), COMMITTED, words, False, None, sum(sizes.values()), len(sizes), None, written
        )


def _unless_gone(storage: Storage, directory: str, make: Callable[[], IterationLine]) -> IterationLine | None:
    """What is said of a directory, or None when it is removed or renamed at this moment, as runs do while somebody looks."""
    try:
        return make()
    except StorageError:
        if storage.stat(directory) is None:
            return None
        raise


def _read_tracker(storage: Storage, root: str) -> tuple[int | None, str | None]:
    path = join(root, TRACKER_FILE)
    if storage.stat(path) is None:
        return None, None
    try:
        return read_tracker(storage, path), None
    except TrackerError as error:
        return None, error.what


def _committed_line(storage: Storage, step: int, directory: str, tracker: int | None) -> IterationLine:
    sizes: dict[str, int] = {}
    written = 0.0
    state, problem, ranks = COMMITTED, None, None
    common: CommonInfo | None = None
    metrics: Mapping[str, float] = {}
    try:
        sizes, written = measure(storage, directory)
        checkpoint = Checkpoint(directory, storage)
        common = checkpoint.common
        ranks = set().union(*(tensor_ranks(tensor) for tensor in checkpoint.catalog.tensors.values()))
        problem = missing_data(checkpoint.catalog, sizes) if checkpoint.seal is None else missing_files(checkpoint.seal, sizes)
        state = COMMITTED if problem is None else DAMAGED
        metrics = checkpoint.metrics
    except (DamagedCheckpointError, CheckpointNotFoundError) as error:
        state, problem = DAMAGED, _one_line(error)
    except StorageError as error:
        if storage.stat(directory) is None:
            raise
        # One that can't be read must not hide the others.
        state, problem = DAMAGED, f"{_one_line(error)}: {error.found}"
    return IterationLine(
        iteration=step,
        directory=os.path.basename(directory),
        state=state,
        problem=problem,
        tracked=step == tracker,
        global_step=None if common is None else common.global_step,
        nbytes=sum(sizes.values()),
        files=len(sizes),
        world_size=len(ranks) if ranks else None,
        modified=written,
        health=None if common is None or common.ckpt_status is None else UNHEALTHY if is_unhealthy(common) else HEALTHY,
        metrics=metrics,
    )


def _torn_line(storage: Storage, directory: str, step: int, tracker: int | None) -> IterationLine:
    name = os.path.basename(directory)
    try:
        sizes, written = measure(storage, directory)
    except StorageError as error:
        entry = storage.stat(directory)
        if entry is None:
            raise
        # What is in it nobody can say; loading it would fail.
        is_tracked = step == tracker and parse_iteration_name(name) is not None
        return IterationLine(step, name, DAMAGED, f"{_one_line(error)}: {error.found}", is_tracked, None, 0, 0, None, entry.modified)
    if parse_iteration_name(name) is not None:
        if SEAL_FILE in sizes:
            # It was whole once, and whoever loads it is told so.
            problem = f"a file of the checkpoint is missing ({METADATA_FILE})"
            return IterationLine(step, name, DAMAGED, problem, step == tracker, None, sum(sizes.values()), len(sizes), None, written)
        problem = f"it has neither {METADATA_FILE} nor the files of a single card"
    elif name.startswith(DELETING_PREFIX):
        problem = "its removal didn't finish, or still goes on"
    elif name.startswith(REPLACED_PREFIX):
        problem = "a newer save of the same step has taken its place"
    else:
        problem = "its save didn't finish, or still goes on"
    if written == 0:
        entry = storage.stat(directory)
        written = 0.0 if entry is None else entry.modified
    return IterationLine(step, name, TORN, problem, False, None, sum(sizes.values()), len(sizes), None, written)


def _one_line(error: ReshardError) -> str:
    """What went wrong and where, for a table."""
    where = "" if error.file is None else f" ({os.path.basename(error.file)})"
    return error.what + where
