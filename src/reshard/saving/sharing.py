"""Whether all hosts of a run see one checkpoint root: a run on several must not write parts of a checkpoint to disks of their own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath

from reshard.comm import Communicator
from reshard.comm.together import attempt, settle
from reshard.errors import UsageError
from reshard.saving.root import discard, probe_name
from reshard.storage import Storage
from reshard.storage.storage import join

SHARED_PATHS = "SHARED_PATHS"

# Network file systems show other hosts' files late: their clients keep listings for some seconds.
_PATIENCE = 60.0
_POLL = 0.1


@cache
def this_host() -> str:
    """What tells this machine from the others of a run: its name, and what its system drew when it started."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text(encoding='ascii').strip() if boot.exists() else ''}"


def is_declared_shared(root: str, paths: str | None) -> bool:
    """Whether a root lies in a directory that the user has declared as shared.

    Args:
        root: an absolute path.
        paths: directories with commas between them, as in the variable SHARED_PATHS. `/data01` is a directory above `/data01/run`, and
            none above `/data011`.
    """
    real = PurePosixPath(os.path.realpath(root))
    return any(real.is_relative_to(os.path.realpath(path.strip())) for path in (paths or "").split(",") if path.strip())


def check_shared(
    storage: Storage, comm: Communicator, root: str, hosts: Sequence[str], token: str, *, is_declared: bool, patience: float = _PATIENCE
) -> None:
    """See that every host of the run finds the root that all others find. Collective.

    The first rank of each host leaves a file there, and looks for those of the other hosts.

    Args:
        storage: where the root lies.
        comm: the ranks.
        root: the checkpoint root; rank 0 has made it.
        hosts: each rank's host.
        token: the run's (8 hexadecimal digits), in the names of the files.
        is_declared: whether SHARED_PATHS says so on all hosts: then nothing is tried.
        patience: seconds in which the others' files must show.

    Raises:
        UsageError: on every rank, when a host doesn't see another's file.
    """
    firsts = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    if len(firsts) == 1 or is_declared:
        return
    names = {rank: join(root, probe_name(f"{token}-{rank}")) for rank in sorted(firsts.values())}
    mine = names.get(comm.rank)

    def leave() -> None:
        if mine is not None and storage.stat(root) is not None:
            storage.write_bytes(mine, token.encode())

    def look() -> None:
        if mine is not None:
            _await_files(storage, comm.rank, root, names, hosts, patience)

    try:
        _, error = attempt(leave)
        settle(comm, error, what="this run can't save there")
        _, error = attempt(look)
        settle(comm, error, what="this run can't save there")
    finally:
        if mine is not None:
            discard(storage, mine)


def _await_files(storage: Storage, rank: int, root: str, names: dict[int, str], hosts: Sequence[str], patience: float) -> None:
    deadline = time.monotonic() + patience
    missing = list(names)
    while True:
        if storage.stat(root) is not None:
            storage.list(root)  # has a client of a network file system ask again
        missing = [other for other in missing if storage.stat(names[other]) is None]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise UsageError(
                "the hosts of this run don't share the checkpoint root",
                file=root,
                rank=rank,
                field="directory",
                found=f"{hosts[rank].split()[0]} doesn't see what {hosts[missing[0]].split()[0]} (rank {missing[0]}) wrote there",
                expected="one directory that all hosts see",
                fix="choose a root on a shared file system; if it is on one and only shows late, name the shared directory above it, best "
                f"the topmost, on every host: export {SHARED_PATHS}=/data01",
            )
        time.sleep(_POLL)
