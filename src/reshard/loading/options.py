"""How the ranks of a job load: whatever they tell each other begins with it, so that ranks that were called differently all hear of it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from reshard.comm import Communicator
from reshard.comm.together import settle
from reshard.errors import ReshardError, UsageError


def tell_options(comm: Communicator, options: str, error: ReshardError | None, payload: bytes, *, what: str) -> list[bytes]:
    """Collective: `settle`, between ranks that may have been called differently, and so are perhaps not at the same place.

    Args:
        comm: the ranks.
        options: this rank's, as text.
        error: as in `settle`.
        payload: likewise; understood only by ranks with the same options.
        what: likewise.

    Raises:
        UsageError: the ranks have different options (on every rank).
        ReshardError: as `settle`.
    """
    mine = b"" if error is not None else msgspec.msgpack.encode((options, payload))
    told = [msgspec.msgpack.decode(data, type=tuple[str, bytes]) for data in settle(comm, error, mine, what=what)]
    check_same_options([options for options, _ in told])
    return [payload for _, payload in told]


def check_same_options(options: Sequence[str]) -> None:
    """See that all ranks go on, or none: where one raises for a misfit that another lets pass, the other would wait for it.

    Args:
        options: each rank's, as text.

    Raises:
        UsageError: they differ.
    """
    for rank, other in enumerate(options):
        if other != options[0]:
            raise UsageError(
                "the ranks were given different options for loading",
                field="strict, only, exclude, balanced, memory_budget, verify, neighbours, on_corrupt, skip_unhealthy, mapping, prefixes",
                rank=rank,
                found=other,
                expected=f"{options[0]}, as on rank 0",
                fix="give every rank the same options",
            )
