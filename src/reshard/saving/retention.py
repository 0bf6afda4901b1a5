"""Which committed checkpoints stay on disk."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from reshard.errors import ReshardError
from reshard.format.names import REPLACED_PREFIX, iteration_name
from reshard.saving.root import deleting_name, discard
from reshard.sources.resolve import list_iterations
from reshard.storage import Storage
from reshard.storage.storage import join

_logger = logging.getLogger("reshard")


def choose_expired(steps: Sequence[int], keep: int, newest: int, spare: Collection[int]) -> list[int]:
    """The iterations that go, those first that were saved first.

    Higher numbers than the one that was just saved are of a continuation that was given up (the run went back to an earlier iteration):
    they are older than all that has been saved since, whatever their numbers say.

    Args:
        steps: the committed ones.
        keep: how many may stay.
        newest: the one that was just saved, which the tracker names; it stays and counts.
        spare: others that stay in any case; they count.
    """
    surplus = len(steps) - keep
    ordered = sorted(steps, key=lambda step: (step < newest, step))
    return [step for step in ordered if step != newest and step not in spare][: max(0, surplus)]


def retire(storage: Storage, root: str, keep: int, newest: int, spare: Collection[int], mark: str) -> tuple[int, ...]:
    """Remove the oldest committed checkpoints of a root until `keep` are left.

    An iteration first loses its name, durably, so that one that is half removed is never taken for a checkpoint. What can't be removed
    is logged and stays: no reason for a save to fail.

    Args:
        storage: where the root lies.
        root: the root; whatever else lies in it is left alone.
        keep: how many may stay, counted on disk, whoever wrote them.
        newest: the iteration that was just saved; it stays.
        spare: other iterations that stay in any case.
        mark: the run's token and a number, for temporary names.

    Returns:
        The iterations that exist no more.
    """
    renamed = []
    try:
        expired = choose_expired([step for step, _ in list_iterations(storage, root)], keep, newest, spare)
        for step in expired:
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
