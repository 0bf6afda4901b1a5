"""What ranks must agree on when a saver is made: who they are on disk, and which files they will write."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from reshard.errors import UsageError


class Opening(msgspec.Struct, array_like=True):
    """What a rank tells the others when a saver is made.

    Attributes:
        token: rank 0's, for temporary names; empty on the others.
        prefix: as in `SaveOptions`; rank 0 derives every rank's file names from its own.
        save_optimizer: likewise.
        remove_redundancy: likewise.
        check_replicas: whether ranks compare what they hold together; who does hashes it, and tells of it.
        async_save: likewise; ranks that save at once and ranks that don't would wait for each other.
        when_busy: likewise; ranks ask each other whether a save is skipped, or don't.
        host: where the rank runs.
        is_declared_shared: whether the user has declared there that the root is shared with the other hosts.
    """

    token: str
    prefix: str | None
    save_optimizer: bool
    remove_redundancy: bool
    check_replicas: bool
    async_save: str | None = None
    when_busy: str = "wait"
    host: str = ""
    is_declared_shared: bool = False


def agree_on_opening(told: Sequence[Opening]) -> Opening:
    """Rank 0's, when every rank writes the files that rank 0 will list in the metadata.

    Raises:
        UsageError: a rank would write others.
    """
    first = told[0]
    for rank, other in enumerate(told):
        for field in ("prefix", "save_optimizer", "remove_redundancy", "check_replicas", "async_save", "when_busy"):
            if getattr(other, field) != getattr(first, field):
                raise UsageError(
                    "the ranks were given different options for saving",
                    field=field,
                    rank=rank,
                    found=repr(getattr(other, field)),
                    expected=f"{getattr(first, field)!r}, as on rank 0",
                    fix="give every rank the same options",
                )
    return first
