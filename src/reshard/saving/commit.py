"""The commit: the moment at which a checkpoint begins to exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from reshard.comm.together import attempt
from reshard.errors import ReshardError, SaveError
from reshard.format.names import REPLACED_PREFIX, TRACKER_FILE, iteration_name
from reshard.format.seal import SealedFile
from reshard.format.tracker import encode_tracker, read_text
from reshard.saving.root import discard, scratch_name
from reshard.storage import Storage
from reshard.storage.storage import join


def check_presence(storage: Storage, directory: str, files: Mapping[int, Mapping[str, SealedFile]]) -> None:
    """See that every file that a rank reports is there, whole, as seen from here.

    Args:
        storage: where they lie.
        directory: the directory that the ranks wrote.
        files: by rank and path inside the directory, what was written.

    Raises:
        SaveError: one isn't.
    """
    listed: dict[str, int] = {}
    for part in sorted({name.rpartition("/")[0] for reported in files.values() for name in reported}):
        prefix = f"{part}/" if part else ""
        listed |= {prefix + entry.name: entry.size for entry in storage.list(join(directory, part) if part else directory)}
    for rank, reported in files.items():
        for name, file in reported.items():
            if listed.get(name) != file.size:
                raise SaveError(
                    "a rank wrote a file that rank 0 doesn't find",
                    file=join(directory, name),
                    rank=rank,
                    found=f"{listed[name]} bytes" if name in listed else "no such file",
                    expected=f"{file.size} bytes",
                    fix="the checkpoint root must lie on a file system that all ranks share",
                )


@dataclass
class Undo:
    """What takes back the steps that were tried, the last one first. Each looks for itself whether its step was done.

    Attributes:
        steps: what is left to do.
        failure: why it could not be done; then names are as it left them, but each checkpoint is whole under one of its names.
    """

    steps: list[Callable[[], None]] = field(default_factory=list)
    failure: ReshardError | None = None

    def run(self) -> None:
        """Take it all back, or set `failure`."""
        while self.steps and self.failure is None:
            _, self.failure = attempt(self.steps.pop())


def publish(storage: Storage, root: str, step: int, temporary: str, mark: str, undo: Undo) -> None:
    """Give a directory that is whole and durable the name of its iteration, and let the tracker name it.

    What can fail for want of space is done first. When a step fails, those before it are undone, so that the root is as it was.

    Args:
        storage: where the root lies.
        root: the root.
        step: the iteration; one that exists is replaced.
        temporary: the directory.
        mark: the run's token and a number, for temporary names.
        undo: an empty one; its `failure` says afterwards whether a failure could be taken back.

    Raises:
        ReshardError: a step failed.
    """
    tracker = join(root, TRACKER_FILE)
    scratch = join(root, scratch_name(mark))
    try:
        before = read_text(storage, tracker)
        storage.write_bytes(scratch, encode_tracker(step))
        replaced = _give_name(storage, root, step, temporary, undo)
        storage.sync_directory(root)
        undo.steps.append(lambda: _restore_tracker(storage, tracker, before, f"{scratch}-undo"))
        storage.replace(scratch, tracker)
        storage.sync_directory(root)
    except Exception:
        undo.run()
        if undo.failure is None:
            discard(storage, scratch)
            discard(storage, temporary)
            with suppress(ReshardError, OSError):
                storage.sync_directory(root)
        raise
    if replaced is not None:
        discard(storage, replaced)


def _give_name(storage: Storage, root: str, step: int, temporary: str, undo: Undo) -> str | None:
    """Rename to the iteration's name; where the old directory of that name is now, if there was one."""
    name = iteration_name(step)
    final = join(root, name)
    there = storage.stat(final)
    if there is not None and not there.is_directory:
        raise SaveError("the name of the iteration is taken by a file", file=final, fix="move the file away")
    if there is not None:
        if storage.exchange(temporary, final):
            undo.steps.append(lambda: _exchange_back(storage, temporary, final))
            return temporary
        replaced = join(root, REPLACED_PREFIX + name)
        # Left by a run that died after its commit: the iteration itself is there.
        storage.remove_tree(replaced)
        undo.steps.append(lambda: _rename_back(storage, replaced, final))
        storage.rename(final, replaced)
        undo.steps.append(lambda: _rename_back(storage, final, temporary))
        storage.rename(temporary, final)
        return replaced
    undo.steps.append(lambda: _rename_back(storage, final, temporary))
    storage.rename(temporary, final)
    return None


def _exchange_back(storage: Storage, temporary: str, final: str) -> None:
    if not storage.exchange(temporary, final):
        raise SaveError("the storage exchanged two directories and now can't", file=final)


def _rename_back(storage: Storage, source: str, target: str) -> None:
    if storage.stat(target) is None:
        storage.rename(source, target)


def _restore_tracker(storage: Storage, tracker: str, before: bytes | None, scratch: str) -> None:
    now = read_text(storage, tracker)
    if now == before:
        return
    if before is None:
        storage.remove(tracker)
        return
    storage.write_bytes(scratch, before)
    storage.replace(scratch, tracker)
