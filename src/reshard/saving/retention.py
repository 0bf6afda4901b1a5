"""Which committed checkpoints stay on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence

from reshard.comm.together import attempt
from reshard.errors import ReshardError
from reshard.format.common import is_unhealthy, read_common
from reshard.format.metrics import read_metrics
from reshard.format.names import COMMON_FILE, METADATA_FILE, REPLACED_PREFIX, iteration_name
from reshard.format.seal import read_seal
from reshard.saving.policies import Committed, KeepPolicy
from reshard.saving.root import deleting_name, discard
from reshard.sources.resolve import list_iterations
from reshard.storage import Storage
from reshard.storage.storage import join

_logger = logging.getLogger("reshard")


def choose_expired(iterations: Sequence[Committed], policy: KeepPolicy, newest: int, spare: Collection[int], now: float) -> list[int]:
    """The iterations that go, those first that were saved first.

    Higher numbers than the one that was just saved are of a continuation that was given up (the run went back to an earlier iteration):
    they are older than all that has been saved since, whatever their numbers say.

    Args:
        iterations: the committed ones.
        policy: what is kept.
        newest: the one that was just saved, which the tracker names; it stays and counts.
        spare: others that stay in any case; they count.
        now: seconds since the epoch.
    """
    ordered = in_order(iterations, newest)
    # Those that stay come last, so that a policy that counts counts them.
    judged = sorted(ordered, key=lambda iteration: (iteration.step == newest, iteration.step in spare))
    stays = policy.keeps(judged, now) | {newest} | set(spare)
    return [iteration.step for iteration in ordered if iteration.step not in stays]


def in_order(iterations: Sequence[Committed], newest: int) -> list[Committed]:
    """Iterations in the order in which they were saved, as far as numbers tell: those above the newest were given up."""
    return sorted(iterations, key=lambda iteration: (iteration.step <= newest, iteration.step))


def retire(storage: Storage, root: str, policy: KeepPolicy, newest: int, spare: Collection[int], mark: str) -> tuple[int, ...]:
    """Remove the committed checkpoints of a root that a policy doesn't keep.

    When the newest is unhealthy, the last one before it that isn't stays, whatever the policy says: it is the one to go back to.

    Args:
        storage: where the root lies.
        root: the root; whatever else lies in it is left alone.
        policy: what is kept of all that is on disk, whoever wrote it.
        newest: the iteration that was just saved; it stays.
        spare: other iterations that stay in any case.
        mark: the run's token and a number, for temporary names.

    Returns:
        The iterations that exist no more.
    """
    try:
        directories = dict(list_iterations(storage, root))
        iterations = survey(storage, directories.items(), with_metrics=policy.needs_metrics)
        refuge = newest_healthy(storage, directories, [iteration.step for iteration in in_order(iterations, newest)])
        stays = {*spare} if refuge is None else {*spare, refuge}
        expired = choose_expired(iterations, policy, newest, stays, time.time())
    except (ReshardError, OSError) as error:
        _logger.warning("can't remove old checkpoints in %s: %s", root, error)
        return ()
    return remove_iterations(storage, root, expired, mark)


def survey(storage: Storage, iterations: Collection[tuple[int, str]], *, with_metrics: bool) -> list[Committed]:
    """Committed iterations as policies see them.

    Args:
        storage: where they lie.
        iterations: number and directory of each.
        with_metrics: whether their metrics are read; else they are empty.

    Raises:
        StorageError: the storage refuses.
    """
    found = []
    for step, directory in iterations:
        # A commit writes these last before the seal. One that is removed meanwhile has no age.
        written = [entry for name in (METADATA_FILE, COMMON_FILE) if (entry := storage.stat(join(directory, name))) is not None]
        metrics: dict[str, float] | None = {}
        if with_metrics:
            metrics, error = attempt(lambda directory=directory: read_metrics(storage, directory, read_seal(storage, directory)))
            if error is not None:
                _logger.warning("can't read the metrics of %s, which therefore stays: %s", directory, error)
        found.append(Committed(step, max((entry.modified for entry in written), default=0.0), metrics))
    return found


def newest_healthy(storage: Storage, directories: dict[int, str], ordered: Sequence[int]) -> int | None:
    """The last of some iterations that isn't unhealthy; None when there is none.

    Args:
        storage: where they lie.
        directories: of the iterations, by number.
        ordered: their numbers, in the order in which they were saved.
    """
    for step in reversed(ordered):
        common, error = attempt(lambda step=step: read_common(storage, join(directories[step], COMMON_FILE)))
        # One whose information is damaged is none to go back to.
        if error is None and not is_unhealthy(common):
            return step
    return None


def remove_iterations(storage: Storage, root: str, steps: Sequence[int], mark: str) -> tuple[int, ...]:
    """Remove committed checkpoints.

    An iteration first loses its name, durably, so that one that is half removed is never taken for a checkpoint. What can't be removed
    is logged and stays: no reason for a save to fail.

    Args:
        storage: where the root lies.
        root: the root.
        steps: the numbers of the iterations.
        mark: the run's token and a number, for temporary names.

    Returns:
        The iterations that exist no more.
    """
    renamed = []
    try:
        for step in steps:
            name = iteration_name(step)
            target = join(root, deleting_name(step, mark))
            # What an interrupted removal of a replaced directory left would be taken for the iteration once its name is free.
            if discard(storage, join(root, REPLACED_PREFIX + name)) and _rename(storage, join(root, name), target):
                renamed.append((step, target))
        if renamed:
            storage.sync_directory(root)
    except (ReshardError, OSError) as error:
        _logger.warning("can't remove old checkpoints in %s: %s", root, error)
        return tuple(step for step, _ in renamed)
    for _, target in renamed:
        discard(storage, target)
    return tuple(step for step, _ in renamed)


def _rename(storage: Storage, source: str, target: str) -> bool:
    try:
        storage.rename(source, target)
    except (ReshardError, OSError) as error:
        _logger.warning("can't remove the old checkpoint %s: %s", source, error)
        return False
    return True
