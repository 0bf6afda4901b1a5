"""States that are saved as something else, through a mapping: on all ranks, or on none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reshard.comm import Communicator
from reshard.comm.together import attempt
from reshard.errors import ReshardError, UsageError
from reshard.planning.agreement import describe, digest
from reshard.planning.telling import encode
from reshard.state import State

# What a rank tells first whose state is changed. Nothing else that ranks tell each other in a save begins so.
_CHANGES = b"through a mapping "


def change_together(
    comm: Communicator, state: State, change: Callable[[State, bool], State], error: ReshardError | None
) -> tuple[State, ReshardError | None]:
    """Collective: the state as it is to be saved, and what went wrong on this rank.

    Args:
        comm: the ranks.
        state: what this rank holds.
        change: makes of it what is saved; its second argument is whether all ranks hold the same.
        error: what already failed on this rank.

    Raises:
        UsageError: other ranks save without one (every rank raises).
    """
    told = comm.all_gather(_CHANGES + (b"" if error is not None else digest(encode(describe(state, 0)))))
    _check([data.startswith(_CHANGES) for data in told], comm.rank, error)
    if error is not None:
        return state, error
    changed, error = attempt(lambda: change(state, len(set(told)) == 1))
    return (state if changed is None else changed), error


def check_none_changes(told: Sequence[bytes], rank: int, error: ReshardError | None) -> None:
    """See that no other rank's state is changed, on a rank whose state isn't.

    Args:
        told: what every rank told where this one told something else.
        rank: this rank.
        error: what failed on it.

    Raises:
        UsageError: as `change_together`.
    """
    _check([data.startswith(_CHANGES) for data in told], rank, error)


def _check(changes: Sequence[bool], rank: int, error: ReshardError | None) -> None:
    if len(set(changes)) == 1:
        return
    if error is not None and not changes[rank]:
        raise error
    without = [number for number, changed in enumerate(changes) if not changed]
    raise UsageError(
        "some ranks save through a mapping, others don't; nothing was saved",
        field="mapping",
        rank=rank,
        found=f"none on rank{'' if len(without) == 1 else 's'} {', '.join(map(str, without[:8]))}, of {len(changes)}",
        expected="the same mapping on every rank",
        fix="give mapping= on every rank",
    )
