"""Local work on every rank that either all survive or all hear fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from reshard import errors
from reshard.comm.communicator import Communicator
from reshard.errors import CommunicationError, ReshardError

T = TypeVar("T")

# An error names so many ranks that failed besides the first.
_RANKS_SHOWN = 8


class _Report(msgspec.Struct, array_like=True):
    kind: str | None
    text: str
    payload: bytes


def attempt(work: Callable[[], T]) -> tuple[T | None, ReshardError | None]:
    """The result of some work, or its error: a rank that fails must still reach the next collective, or the others wait for it.

    Raises:
        CommunicationError: the ranks can't reach each other; there is no next collective.
    """
    try:
        return work(), None
    except CommunicationError:
        raise
    except ReshardError as error:
        return None, error
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        wrapped = ReshardError(f"{type(error).__name__}: {error}", fix="this is a defect or a broken machine; the cause is above")
        wrapped.__cause__ = error
        return None, wrapped


def settle(comm: Communicator, error: ReshardError | None, payload: bytes = b"", *, what: str) -> list[bytes]:
    """Collective: tell each other how it went.

    Args:
        comm: the ranks.
        error: this rank's, or None.
        payload: what this rank tells the others when it went well.
        what: what failed, in words, if it did: the consequence for the caller.

    Returns:
        Every rank's payload, in rank order.

    Raises:
        ReshardError: when any rank failed, on every rank the same: of the class and with the text of the first failed rank.
        CommunicationError: the ranks can't reach each other; it has this rank's error in it.
    """
    mine = _Report(None, "", payload) if error is None else _Report(type(error).__name__, str(error), b"")
    try:
        gathered = comm.all_gather(msgspec.msgpack.encode(mine))
    except CommunicationError as gone:
        if error is None:
            raise
        raise unheard(error, gone) from error
    reports = [msgspec.msgpack.decode(data, type=_Report) for data in gathered]
    failed = [rank for rank, report in enumerate(reports) if report.kind is not None]
    if not failed:
        return [report.payload for report in reports]
    first = failed[0]
    if len(reports) == 1 and error is not None:
        raise error
    others = ", ".join(str(rank) for rank in failed[1 : 1 + _RANKS_SHOWN]) + (", …" if len(failed) > 1 + _RANKS_SHOWN else "")
    where = f"rank {first}" + (f", and ranks {others} ({len(failed)} of {len(reports)})" if others else f" (of {len(reports)})")
    raise _error_of(reports[first], where, what) from error


def unheard(error: ReshardError, gone: CommunicationError) -> CommunicationError:
    """What a rank raises that failed and could not tell the others: its own error must not be lost over that."""
    return CommunicationError(f"{error}\n  besides:  the other ranks could not be told: {gone.what}")


def together(comm: Communicator, work: Callable[[], T], *, what: str) -> T:
    """Collective: do local work on every rank; when it fails anywhere, every rank raises the same error.

    Raises:
        ReshardError: as in `settle`.
    """
    result, error = attempt(work)
    settle(comm, error, what=what)
    return result  # type: ignore[return-value]  # settle raises when this rank has no result


def from_first(comm: Communicator, work: Callable[[], T], kind: type[T], *, what: str) -> T:
    """Collective: rank 0 does the work (what it looks at may change under the others' eyes), every rank has its result; rank 0 itself, not
    a copy.

    Args:
        comm: the ranks.
        work: done on rank 0 only.
        kind: the type of the result, one that msgspec can carry.
        what: as in `settle`.

    Raises:
        ReshardError: rank 0's, on every rank.
    """
    told = b""
    result: T | None = None
    error: ReshardError | None = None
    if comm.rank == 0:
        result, error = attempt(work)
        told = msgspec.msgpack.encode(_report(error, b"" if error is not None else msgspec.msgpack.encode(result)))
    report = msgspec.msgpack.decode(comm.broadcast(told), type=_Report)
    if report.kind is None:
        return result if comm.rank == 0 else msgspec.msgpack.decode(report.payload, type=kind)  # type: ignore[return-value]  # it has one
    if comm.world_size == 1 and error is not None:
        raise error
    raise _error_of(report, f"rank 0 (of {comm.world_size})", what) from error


def _report(error: ReshardError | None, payload: bytes) -> _Report:
    return _Report(None, "", payload) if error is None else _Report(type(error).__name__, str(error), b"")


def _error_of(report: _Report, where: str, what: str) -> ReshardError:
    kind = getattr(errors, report.kind or "", ReshardError)
    return kind(f"{report.text}\n  on:       {where}\n  so:       {what}")
