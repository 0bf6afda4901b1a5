"""The checkpoint root of a run that saves: made, locked, and cleaned of what dead runs left."""

from __future__ import annotations

import datetime as dt
import logging
import os
import posixpath
import re
import socket
import time

from reshard.errors import ReshardError, RootLockedError, SaveError
from reshard.format.names import REPLACED_PREFIX, iteration_name, parse_iteration_name
from reshard.storage import Lock, Storage
from reshard.storage.storage import join

_logger = logging.getLogger("reshard")

LOCK_FILE = ".reshard.lock"
DELETING_PREFIX = ".deleting-"
SAVING_PREFIX = ".saving-"

# Only names that this module's functions make are ever removed.
_LEFTOVER = re.compile(r"\.(saving|deleting)-(iteration_\d{8,18}|tracker|probe)-[0-9a-f]{8}-\d+(-undo)?", re.ASCII)

# Between two attempts to take the lock (seconds): short against the time in which a dying process goes away.
_POLL = 0.1


def saving_name(step: int, mark: str) -> str:
    """The directory of an iteration that is being written; no reader takes it for a checkpoint.

    Args:
        step: the iteration.
        mark: the run's token (8 hexadecimal digits), a dash, and a number of its own: no two attempts share a name.
    """
    return f"{SAVING_PREFIX}{iteration_name(step)}-{mark}"


def scratch_name(mark: str) -> str:
    """The tracker that is being written."""
    return f"{SAVING_PREFIX}tracker-{mark}"


def probe_name(mark: str) -> str:
    """A file by which hosts see that they share the root."""
    return f"{SAVING_PREFIX}probe-{mark}"


def deleting_name(step: int, mark: str) -> str:
    """The directory of an iteration that is being removed."""
    return f"{DELETING_PREFIX}{iteration_name(step)}-{mark}"


def is_leftover(name: str) -> bool:
    """Whether a name is one that a run gives to something that it is writing or removing: nobody's, when no run holds the root."""
    return _LEFTOVER.fullmatch(name) is not None


def is_leftover_of(name: str, token: str) -> bool:
    """Whether a name is one that the run of this token gave to something that it was writing or removing."""
    return is_leftover(name) and f"-{token}-" in name


def open_root(storage: Storage, root: str, lock_timeout: float) -> Lock:
    """Make a root if there is none, take its lock, and set right what dead runs left.

    Args:
        storage: where it lies.
        root: its path.
        lock_timeout: seconds to wait for the lock; in a restart loop the process before may be just dying.

    Returns:
        The lock; it ends with this process at the latest.

    Raises:
        RootLockedError: another process holds it.
        StorageError: the storage refuses.
    """
    _make_durable(storage, root)
    lock = take_lock(storage, root, lock_timeout)
    try:
        _recover(storage, root)
    except BaseException:
        lock.release()
        raise
    return lock


def _make_durable(storage: Storage, root: str) -> None:
    """Make a directory whose name, and whose missing parents' names, survive a power loss."""
    missing = []
    path = root
    while storage.stat(path) is None:
        missing.append(path)
        path = posixpath.dirname(path)
    if not missing:
        return
    storage.make_directory(root)
    for made in reversed(missing):
        storage.sync_directory(posixpath.dirname(made))


def take_lock(storage: Storage, root: str, timeout: float) -> Lock:
    """Take the lock of a root that exists, and change nothing else in it.

    Args:
        storage: where it lies.
        root: its path.
        timeout: seconds to wait for it.

    Raises:
        RootLockedError: another process holds it.
        StorageError: the storage refuses.
    """
    path = join(root, LOCK_FILE)
    now = dt.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    owner = f"process {os.getpid()} on host {socket.gethostname()}, since {now}"
    deadline = time.monotonic() + timeout
    waited = False
    while True:
        taken = storage.lock(path, owner)
        if not isinstance(taken, str):
            return taken
        left = deadline - time.monotonic()
        if left <= 0:
            raise RootLockedError(
                "another run writes this checkpoint root",
                file=root,
                found=f"held by {taken}",
                fix=f"wait until it ends, end it, or give this run another root (waited {timeout:g} s)",
            )
        if not waited:
            _logger.info("the checkpoint root %s is held by %s; waiting up to %g s", root, taken, timeout)
            waited = True
        time.sleep(min(_POLL, left))


def _recover(storage: Storage, root: str) -> None:
    """Remove what nobody writes any more (the lock is held), and give an iteration its name back that lost it between two renames.

    A leftover that can't be removed is in nobody's way; an iteration that can't get its name back is.
    """
    for entry in storage.list(root):
        path = join(root, entry.name)
        if entry.is_directory and entry.name.startswith(REPLACED_PREFIX):
            name = entry.name.removeprefix(REPLACED_PREFIX)
            if parse_iteration_name(name) is None:
                continue
            if storage.stat(join(root, name)) is None:
                storage.rename(path, join(root, name))
                storage.sync_directory(root)
                _logger.warning("a save that was to replace %s in %s was interrupted; the old one is back", name, root)
            else:
                discard(storage, path)
        elif is_leftover(entry.name):
            discard(storage, path)


def discard(storage: Storage, path: str) -> bool:
    """Remove a file or a directory that isn't needed any more; whether it is gone. A failure is only logged: the next run tries again."""
    try:
        entry = storage.stat(path)
        if entry is None:
            return True
        if entry.is_directory:
            storage.remove_tree(path)
        else:
            storage.remove(path)
    except (ReshardError, OSError) as error:
        _logger.warning("can't remove %s, which isn't needed any more: %s", path, error)
        return False
    return True


def check_lock(lock: Lock | None, root: str) -> None:
    """See that no other run can be writing a root.

    Args:
        lock: this run's; None when it has none.
        root: the root.

    Raises:
        SaveError: the lock is gone.
    """
    if lock is None or not lock.is_held():
        raise SaveError(
            "this run's lock on the checkpoint root is gone",
            file=join(root, LOCK_FILE),
            found="the root or its lock file was removed, or this is a forked child of the process that took the lock",
            fix="make the manager anew; leave the lock file where it is while a run writes",
        )


def is_same_directory(root: str | None, other: str) -> bool:
    """Whether two paths mean the same directory; one may lead through a symbolic link."""
    return root is not None and os.path.realpath(root) == os.path.realpath(other)
