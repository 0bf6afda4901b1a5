"""The folder of an export: written under a temporary name, and given its own when it is whole."""

from __future__ import annotations

import os
import posixpath
import socket

from reshard.errors import UsageError
from reshard.format.names import DATA_SUFFIX, TRACKER_FILE, parse_iteration_name
from reshard.sources.huggingface import CONFIG_FILE, WEIGHTS_INDEX_FILE, holds_weights
from reshard.storage import Lock, Storage
from reshard.storage.storage import join


class ExportFolder:
    """The folder that an export makes. One process, rank 0, has it; the others only write files into `temporary`.

    Args:
        storage: where it lies.
        folder: its path.
        source: the directory of what is exported.
        force: whether a folder of weights that is there is replaced.

    Attributes:
        temporary: where its files are written.

    Raises:
        UsageError: something else is there, or another export writes it.
        StorageError: the storage refuses.
    """

    def __init__(self, storage: Storage, folder: str, source: str | None, *, force: bool) -> None:
        self._storage = storage
        self._folder = folder = posixpath.normpath(folder)
        self._parent, name = posixpath.split(folder)
        _check_target(storage, folder, source, force=force)
        self.temporary = temporary_of(folder)
        storage.make_directory(self._parent)
        self._lock_file = join(self._parent, f".exporting-{name}.lock")
        lock = storage.lock(self._lock_file, f"process {os.getpid()} on {socket.gethostname()}")
        if isinstance(lock, str):
            raise UsageError("another export writes this folder", field="folder", file=folder, found=lock, fix="wait for it, or end it")
        self._lock: Lock | None = lock
        # What an export that was killed has left: its lock ended with it.
        storage.remove_tree(self.temporary)
        storage.make_directory(self.temporary)

    def publish(self) -> None:
        """Give the folder its name: it is whole from now on. What it replaces is removed, but for files that are no weights.

        Raises:
            StorageError: the storage refuses.
        """
        storage, folder, temporary = self._storage, self._folder, self.temporary
        storage.sync_directory(temporary)
        if storage.stat(folder) is None:
            storage.rename(temporary, folder)
        elif not storage.exchange(temporary, folder):
            aside = f"{temporary}-replaced"
            storage.rename(folder, aside)
            storage.rename(temporary, folder)
            storage.rename(aside, temporary)
        if storage.stat(temporary) is not None:
            self._keep_others(temporary, folder)
        storage.sync_directory(folder)
        storage.sync_directory(self._parent)

    def _keep_others(self, old: str, new: str) -> None:
        """What lay beside the old weights (a tokenizer) stays."""
        there = {entry.name for entry in self._storage.list(new)}
        for entry in self._storage.list(old):
            is_weights = entry.name in (CONFIG_FILE, WEIGHTS_INDEX_FILE) or (entry.name.endswith(DATA_SUFFIX) and not entry.is_directory)
            if not is_weights and entry.name not in there:
                self._storage.rename(join(old, entry.name), join(new, entry.name))

    def close(self) -> None:
        """Remove what is left under temporary names, and let other exports in."""
        lock, self._lock = self._lock, None
        if lock is not None:
            self._storage.remove_tree(self.temporary)
            self._storage.remove(self._lock_file)
            lock.release()


def temporary_of(folder: str) -> str:
    """Where the files of a folder are written before it is whole."""
    parent, name = posixpath.split(posixpath.normpath(folder))
    return join(parent, f".exporting-{name}")


def _check_target(storage: Storage, folder: str, source: str | None, *, force: bool) -> None:
    there = storage.stat(folder)
    if there is None:
        return
    if not there.is_directory:
        raise UsageError("the export's folder is a file", field="folder", file=folder, fix="give another path")
    names = {entry.name for entry in storage.list(folder)}
    if not names:
        return
    if source is not None and (source == folder or source.startswith(f"{folder}/")):
        raise UsageError(
            "an export can't take the place of what it reads", field="folder", file=folder, found=source, fix="give another path"
        )
    is_export = holds_weights(names) and TRACKER_FILE not in names and not any(parse_iteration_name(name) is not None for name in names)
    if not is_export:
        raise UsageError(
            "the folder is not empty, and holds something else than Hugging Face weights",
            field="folder",
            file=folder,
            found=", ".join(sorted(names)[:5]),
            fix="give another path",
        )
    if not force:
        raise UsageError(
            "the folder is not empty", field="folder", file=folder, found=", ".join(sorted(names)[:5]), fix="give another path, or --force"
        )
