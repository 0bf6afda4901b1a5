"""`reshard ls ROOT`: which checkpoints a root holds, and in which state they are."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from reshard.catalog import Catalog
from reshard.checkpoint import Checkpoint
from reshard.cli.layouts import tensor_ranks
from reshard.cli.output import JsonOption, age_words, console, fits, print_json, size_words, table, timestamp
from reshard.errors import CheckpointNotFoundError, DamagedCheckpointError, ReshardError, StorageError, TrackerError
from reshard.format.index import INDEX_FILE
from reshard.format.names import COMMON_FILE, EXTRA_DIRECTORY, METADATA_FILE, REPLACED_PREFIX, TRACKER_FILE, parse_iteration_name
from reshard.format.seal import Seal
from reshard.format.tracker import read_tracker
from reshard.saving.root import DELETING_PREFIX
from reshard.sources.resolve import list_iterations
from reshard.storage import PosixStorage, Storage
from reshard.storage.storage import join

COMMITTED = "committed"
TORN = "torn"
DAMAGED = "damaged"

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


@dataclass(frozen=True)
class RootListing:
    """What a root holds.

    Attributes:
        root: its path.
        tracker: the iteration that the tracker names, None when it names none.
        tracker_problem: what is wrong with the tracker, None when nothing is.
        iterations: oldest first.
    """

    root: str
    tracker: int | None
    tracker_problem: str | None
    iterations: tuple[IterationLine, ...]


def ls(
    root: Annotated[str, typer.Argument(help="The checkpoint root: the directory that holds the iterations.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """List a root's checkpoints, and the one a run resumes from."""
    listing = list_root(PosixStorage(), os.path.abspath(root))
    if json:
        print_json(_document(listing))
    else:
        _print(listing)


def list_root(storage: Storage, root: str) -> RootListing:
    """What a root holds, committed or not.

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
        here = any(storage.stat(join(root, name)) is not None for name in (METADATA_FILE, COMMON_FILE))
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
    state, problem, global_step, ranks = COMMITTED, None, None, None
    try:
        sizes, written = _measure(storage, directory)
        checkpoint = Checkpoint(directory, storage)
        global_step = None if checkpoint.common is None else checkpoint.common.global_step
        ranks = set().union(*(tensor_ranks(tensor) for tensor in checkpoint.catalog.tensors.values()))
        problem = _missing_data(checkpoint.catalog, sizes) if checkpoint.seal is None else _missing_files(checkpoint.seal, sizes)
        state = COMMITTED if problem is None else DAMAGED
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
        global_step=global_step,
        nbytes=sum(sizes.values()),
        files=len(sizes),
        world_size=len(ranks) if ranks else None,
        modified=written,
    )


def _missing_data(catalog: Catalog, sizes: Mapping[str, int]) -> str | None:
    """What data is missing of a checkpoint without a seal, as far as the names and sizes of files tell; None when nothing is.

    No file is opened: a root may hold many thousands of them.
    """
    promised: dict[str, int] = {}
    for tensor in catalog.tensors.values():
        for chunk in tensor.chunks:
            nbytes = chunk.region.size * tensor.dtype.itemsize
            for place in chunk.places:
                promised[place.file] = promised.get(place.file, 0) + nbytes
    missing = sorted(file for file in promised if file not in sizes)
    if missing:
        return f"{len(missing)} of {len(promised)} data files {'is' if len(missing) == 1 else 'are'} missing ({missing[0]})"
    short = sorted(file for file, nbytes in promised.items() if sizes[file] < nbytes)
    if short:
        return f"{len(short)} of {len(promised)} data files {'is' if len(short) == 1 else 'are'} truncated ({short[0]})"
    return None


def _missing_files(seal: Seal, sizes: Mapping[str, int]) -> str | None:
    """What is missing of all that the seal lists, likewise; None when nothing is."""
    # It can be deleted: a reader makes it anew.
    needed = {name: file.size for name, file in seal.files.items() if name != join(EXTRA_DIRECTORY, INDEX_FILE)}
    missing = sorted(needed.keys() - sizes.keys())
    if missing:
        return f"{len(missing)} of {len(needed)} files {'is' if len(missing) == 1 else 'are'} missing ({missing[0]})"
    changed = sorted(name for name, size in needed.items() if sizes[name] != size)
    if changed:
        return f"{len(changed)} of {len(needed)} files {'has' if len(changed) == 1 else 'have'} another size than when saved ({changed[0]})"
    return None


def _torn_line(storage: Storage, directory: str, step: int, tracker: int | None) -> IterationLine:
    name = os.path.basename(directory)
    try:
        sizes, written = _measure(storage, directory)
    except StorageError as error:
        entry = storage.stat(directory)
        if entry is None:
            raise
        # What is in it nobody can say; loading it would fail.
        is_tracked = step == tracker and parse_iteration_name(name) is not None
        return IterationLine(step, name, DAMAGED, f"{_one_line(error)}: {error.found}", is_tracked, None, 0, 0, None, entry.modified)
    if parse_iteration_name(name) is not None:
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


def _measure(storage: Storage, directory: str) -> tuple[dict[str, int], float]:
    """The files that lie in a directory and below it (paths inside it) with their sizes, and the last modification."""
    sizes: dict[str, int] = {}
    modified = 0.0
    waiting = [""]
    while waiting:
        below = waiting.pop()
        for entry in storage.list(join(directory, below) if below else directory):
            name = join(below, entry.name)
            if entry.is_directory:
                waiting.append(name)
                continue
            sizes[name] = entry.size
            modified = max(modified, entry.modified)
    return sizes, modified


def _document(listing: RootListing) -> dict[str, Any]:
    return {
        "root": listing.root,
        "tracker": listing.tracker,
        "tracker_problem": listing.tracker_problem,
        "iterations": [{**asdict(line), "modified": timestamp(line.modified)} for line in listing.iterations],
    }


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _print(listing: RootListing) -> None:
    columns = [
        ("", "left"),
        ("iteration", "right"),
        ("global step", "right"),
        ("size", "right"),
        ("files", "right"),
        ("ranks", "right"),
        ("age", "right"),
        ("state", "left"),
    ]
    rows = [
        (
            "*" if line.tracked else "",
            str(line.iteration),
            _number(line.global_step),
            size_words(line.nbytes),
            str(line.files),
            _number(line.world_size),
            age_words(line.modified),
            line.state if line.problem is None else f"{line.state}: {line.problem}",
        )
        for line in listing.iterations
    ]
    out = console()
    out.print(listing.root, soft_wrap=True)
    listed = table(columns, rows)
    if rows and fits(out, listed):
        out.print(listed)
    else:
        # A cell that is cut off is a wrong number: each iteration takes two lines.
        for mark, iteration, step, size, files, ranks, age, state in rows:
            out.print(f"{mark or ' '} {iteration}  {state}", soft_wrap=True)
            facts = (f"step {step}" if step else "", size, f"{files} files", f"ranks: {ranks}" if ranks else "", f"{age} old")
            out.print("    " + ", ".join(filter(None, facts)), soft_wrap=True)
    if listing.tracker_problem is not None:
        words = f"tracker: {listing.tracker_problem}"
    elif listing.tracker is None:
        words = f"tracker: none ({TRACKER_FILE} is missing); a run resumes from the newest committed iteration"
    else:
        words = f"* the tracker: a run resumes from iteration {listing.tracker}"
    out.print(words, soft_wrap=True)
