"""From a path to the directory of one checkpoint: a root by its tracker, or an iteration itself."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from reshard.errors import CheckpointNotFoundError, StorageError, TrackerError
from reshard.format.names import (
    COMMON_FILE,
    DATA_SUFFIX,
    METADATA_FILE,
    REPLACED_PREFIX,
    TRACKER_FILE,
    iteration_name,
    kind_of_file,
    parse_iteration_name,
    total_of_file,
)
from reshard.format.tracker import read_tracker
from reshard.sources.huggingface import holds_weights
from reshard.sources.legacy.ranks import CKPT_SUFFIX, is_legacy_directory
from reshard.sources.pytorch.dcp import is_dcp
from reshard.sources.pytorch.dcp_metadata import DCP_METADATA_FILE
from reshard.sources.pytorch.saved_folder import is_saved_folder
from reshard.storage import Entry, Storage
from reshard.storage.storage import join

# Files of a checkpoint's directory that are no checkpoint by themselves; of any other file its begin says whether it is one.
_TEXT_SUFFIXES = (".json", ".txt", ".yaml", ".index", ".distcp", DCP_METADATA_FILE)


@dataclass(frozen=True)
class Resolved:
    """Where a checkpoint lies.

    Attributes:
        directory: of the checkpoint's files.
        iteration: its number; None when the directory's name has none.
        root: the checkpoint root that it belongs to, or None.
        notes: what the user should know about the choice.
    """

    directory: str
    iteration: int | None
    root: str | None
    notes: tuple[str, ...] = ()


def resolve(storage: Storage, path: str) -> Resolved:
    """The checkpoint that a path means: of a root the one that its tracker names, else its newest; or the iteration itself, or a folder
    of Hugging Face weights.

    Args:
        storage: where it lies.
        path: a checkpoint root, the directory of one checkpoint, or a folder of weights.

    Raises:
        CheckpointNotFoundError: there is none.
        TrackerError: the tracker is empty, not a number, or names an iteration that isn't there.
        StorageError: the root can't be listed; or there is no tracker, and an iteration that can't be looked at may be the newest.
    """
    path = posixpath.normpath(path)
    there = storage.stat(path)
    if there is None:
        replaced = _replaced(storage, path)
        if replaced is not None:
            return replaced
        raise CheckpointNotFoundError(
            "there is no such checkpoint", file=path, found="nothing", fix="give a checkpoint root or an iteration"
        )
    if not there.is_directory:
        if path.endswith(_TEXT_SUFFIXES) or kind_of_file(posixpath.basename(path)) is not None:
            raise CheckpointNotFoundError(
                "a checkpoint is a directory, and this is a file", file=path, fix="give the directory that it lies in"
            )
        return Resolved(path, None, None)
    entries = storage.list(path)
    if any(entry.name == TRACKER_FILE for entry in entries):
        return _tracked(storage, path)
    if _has_checkpoint_files(entries):
        step = _step_of(posixpath.basename(path))
        return Resolved(path, step, None if step is None else posixpath.dirname(path))
    committed, refused = _look(storage, path, entries)
    _check_newest(committed, refused)
    if committed:
        step, directory = committed[-1]
        note = f"{path} has no tracker ({TRACKER_FILE}); took the newest of {len(committed)} iterations, {step}"
        return Resolved(directory, step, path, (note, *_replaced_note(directory), *_refused_note(refused)))
    if is_legacy_directory(storage, path, entries):
        return Resolved(path, None, None)
    raise CheckpointNotFoundError(
        "there is no checkpoint in this directory", file=path, found=_listing(entries), fix=_nearby(storage, path, entries)
    )


def latest(storage: Storage, root: str) -> Resolved | None:
    """What `resolve` gives for a root, or None when no checkpoint was ever committed there (a fresh start).

    Raises:
        CheckpointNotFoundError: the path is a file.
        TrackerError: as in `resolve`; a damaged tracker is no reason to start afresh.
        StorageError: as in `resolve`; nor is an iteration that can't be read.
    """
    there = storage.stat(posixpath.normpath(root))
    if there is None and _replaced(storage, posixpath.normpath(root)) is None:
        return None
    if there is not None and there.is_directory:
        entries = storage.list(root)
        if not any(e.name == TRACKER_FILE for e in entries) and not _has_checkpoint_files(entries):
            committed, refused = _look(storage, root, entries)
            _check_newest(committed, refused)
            if not committed and not is_legacy_directory(storage, posixpath.normpath(root), entries):
                return None
    return resolve(storage, root)


def list_iterations(storage: Storage, root: str) -> list[tuple[int, str]]:
    """The committed checkpoints of a root: number and directory, sorted by number; none when the root doesn't exist.

    Committed is what has its `metadata.json`, or is of a single card (`common.json` and data files of one rank). An iteration whose
    replacement was interrupted counts under its number. One that can't be looked at is left out.

    Raises:
        StorageError: the root can't be listed.
    """
    there = storage.stat(root)
    return [] if there is None else _look(storage, root, storage.list(root))[0]


def _look(storage: Storage, root: str, entries: Sequence[Entry]) -> tuple[list[tuple[int, str]], dict[int, StorageError]]:
    """The committed iterations, sorted by number, and why others can't be looked at: no reason to refuse the good ones."""
    found: dict[int, str] = {}
    refused: dict[int, StorageError] = {}
    # Sorted names put ".replaced-…" in front, so that the real name wins.
    for entry in sorted(entries, key=lambda entry: entry.name):
        step = _step_of(entry.name)
        directory = join(root, entry.name)
        if step is None or not entry.is_directory:
            continue
        try:
            if _is_still_committed(storage, directory):
                found[step] = directory
        except StorageError as error:
            refused[step] = error
    return sorted(found.items()), refused


def _check_newest(committed: Sequence[tuple[int, str]], refused: Mapping[int, StorageError]) -> None:
    """Without a tracker the newest counts: see that it isn't one that can't be looked at. An older one in its place, or a fresh start,
    would lose work.
    """
    if refused and max(refused) > (committed[-1][0] if committed else -1):
        raise refused[max(refused)]


def _refused_note(refused: Mapping[int, StorageError]) -> tuple[str, ...]:
    return tuple(f"{error.file} was left out: {error.what} ({error.found})" for _, error in sorted(refused.items()))


def _is_still_committed(storage: Storage, directory: str) -> bool:
    """As `is_committed`, of a directory that the run which saves may just be replacing or removing."""
    try:
        return is_committed(storage, directory)
    except StorageError:
        if storage.stat(directory) is None:
            return False
        raise


def is_committed(storage: Storage, directory: str) -> bool:
    """Whether an iteration's directory holds a whole checkpoint, as far as its names tell.

    Raises:
        StorageError: it can't be listed.
    """
    if storage.stat(join(directory, METADATA_FILE)) is not None:
        return True
    names = [entry.name for entry in storage.list(directory)]
    data = [name for name in names if kind_of_file(name) is not None]
    return COMMON_FILE in names and bool(data) and all(total_of_file(name) == 1 for name in data)


def _tracked(storage: Storage, root: str) -> Resolved:
    tracker = join(root, TRACKER_FILE)
    step = read_tracker(storage, tracker)
    # Only now: what the tracker names was there before it did, but perhaps not when somebody looked earlier.
    entries = storage.list(root)
    committed, refused = _look(storage, root, entries)
    directory = dict(committed).get(step)
    if directory is None:
        # An incomplete one is taken at its word: opening it says what is missing.
        directory = join(root, iteration_name(step))
        if not any(entry.name == iteration_name(step) and entry.is_directory for entry in entries):
            steps = [number for number, _ in committed]
            raise TrackerError(
                "the tracker names an iteration that isn't there",
                file=tracker,
                found=f"{step}, but no {iteration_name(step)}",
                expected=f"one of {_numbers(steps)}" if steps else "an iteration; there is none",
                fix=f"write {steps[-1]} into it to resume from the newest"
                if steps
                else "give another root, or remove the tracker to start afresh",
            )
    # Of the tracked one opening it says what is wrong.
    notes = (*_replaced_note(directory), *_refused_note({number: error for number, error in refused.items() if number != step}))
    newer = [number for number, _ in committed if number > step]
    if newer:
        notes = (*notes, f"the tracker names iteration {step}; newer ones exist and are not used: {_numbers(newer)}")
    return Resolved(directory, step, root, notes)


def _step_of(name: str) -> int | None:
    return parse_iteration_name(name.removeprefix(REPLACED_PREFIX))


def _replaced(storage: Storage, path: str) -> Resolved | None:
    """The iteration of a missing path, where a save that was to replace it died between two renames."""
    root, name = posixpath.split(path)
    directory = join(root, REPLACED_PREFIX + name)
    step = parse_iteration_name(name)
    if step is None or storage.stat(directory) is None or not is_committed(storage, directory):
        return None
    return Resolved(directory, step, root, _replaced_note(directory))


def _replaced_note(directory: str) -> tuple[str, ...]:
    name = posixpath.basename(directory)
    if not name.startswith(REPLACED_PREFIX):
        return ()
    return (f"a save that was to replace {name.removeprefix(REPLACED_PREFIX)} was interrupted; took the old one, {name}",)


def _has_checkpoint_files(entries: Sequence[Entry]) -> bool:
    names = {entry.name for entry in entries if not entry.is_directory}
    return (
        METADATA_FILE in names
        or COMMON_FILE in names
        or any(name.endswith(DATA_SUFFIX) for name in names)
        or holds_weights(names)
        or is_dcp(names)
        or is_saved_folder(names)
    )


def _numbers(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[-10:])) if len(steps) <= 10 else f"… {', '.join(map(str, steps[-10:]))}"


def _listing(entries: Sequence[Entry]) -> str:
    names = [entry.name for entry in entries]
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "an empty directory"


def _nearby(storage: Storage, path: str, entries: Sequence[Entry]) -> str:
    for entry in entries:
        # It is a hint only: what can't be looked at is none.
        with suppress(StorageError):
            if entry.is_directory and storage.stat(join(path, entry.name, TRACKER_FILE)) is not None:
                return f"did you mean {join(path, entry.name)}?"
    for entry in entries:
        if entry.name.endswith(CKPT_SUFFIX) and not entry.is_directory:
            return f"give the path of a file, such as {join(path, entry.name)}"
    return "give a checkpoint root (with a tracker or iteration_ directories) or an iteration"
