"""The error of a rank, as its launcher raises it."""

from __future__ import annotations

import reshard.errors
from reshard.errors import ReshardError


class RankFailedError(RuntimeError):
    """A rank ended by something that no error of this package explains; the message has its traceback, or the signal that killed it."""


def error_of_rank(kind: str, message: str, rank: object) -> Exception:
    """The error of a rank, as it was raised there.

    Args:
        kind: the name of its class.
        message: its text; of an error that isn't this package's with the stack.
        rank: of whom.
    """
    known = getattr(reshard.errors, kind, None)
    if isinstance(known, type) and issubclass(known, ReshardError):
        return known(message)
    return RankFailedError(f"rank {rank} failed:\n{message}")
