"""How ranks that all run on one machine find each other over sockets that have no file, and know that it is they."""

from __future__ import annotations

import hmac
import secrets
import socket
from contextlib import ExitStack, suppress

import msgspec

from reshard.comm.communicator import Communicator
from reshard.comm.neighbours import find_host
from reshard.errors import CommunicationError

_KEY_BYTES = 32
_RANK_BYTES = 4


class _Place(msgspec.Struct, array_like=True, frozen=True):
    """Where a rank runs, and where rank 0 listens.

    Attributes:
        host: the machine, and what of its network the process can see; empty where nothing tells.
        name: of rank 0's socket; empty of the others, and where there is none.
        key: what only ranks of the job know.
    """

    host: str
    name: str = ""
    key: bytes = b""


def meet(comm: Communicator) -> dict[int, socket.socket] | None:
    """Connections of rank 0 with all others. Collective.

    Args:
        comm: over which they tell each other where they are.

    Returns:
        By the rank at the other end: on rank 0 all others, on those rank 0; None on all of them where they don't all run on one machine,
        or where one of them can't be reached. They are the caller's, to be closed.

    Raises:
        CommunicationError: they can't tell each other.
    """
    host = find_host("net") or ""
    with ExitStack() as opened:
        listener, mine = None, _Place(host)
        if comm.rank == 0 and host:
            with suppress(OSError):
                name = f"\0reshard-{secrets.token_hex(16)}"
                listener = opened.enter_context(_listen(name, comm.world_size))
                mine = _Place(host, name, secrets.token_bytes(_KEY_BYTES))
        places = [_understood(told, rank) for rank, told in enumerate(comm.all_gather(msgspec.msgpack.encode(mine)))]
        first = places[0]
        if not first.name or any(place.host != host for place in places):
            return None
        lines: dict[int, socket.socket] = {}
        if listener is None:
            with suppress(OSError):
                lines[0] = opened.enter_context(_call(first, comm.rank))
        # Whoever says that it has called needn't be waited for any more.
        have_called = comm.all_gather(b"yes" if lines else b"")
        if listener is not None and all(have_called[1:]):
            with suppress(OSError):
                lines = _accept(listener, comm.world_size, first.key)
            for line in lines.values():
                opened.enter_context(line)
        if not comm.broadcast(b"all" if lines else b""):
            return None
        if listener is not None:
            listener.close()
        opened.pop_all()
        return lines


def _understood(told: bytes, rank: int) -> _Place:
    try:
        return msgspec.msgpack.decode(told, type=_Place)
    except msgspec.MsgspecError as error:
        fix = "start all ranks with the same version of reshard"
        raise CommunicationError("a rank can't be understood", rank=rank, found=str(error), fix=fix) from error


def _listen(name: str, backlog: int) -> socket.socket:
    """A socket under a name that ends with it.

    Raises:
        OSError: the system gives none.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(name)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def _call(first: _Place, rank: int) -> socket.socket:
    """A connection with rank 0, on which it is told who calls; it needn't listen yet.

    Raises:
        OSError: it can't be reached.
    """
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.setblocking(False)  # a listener that was made for all has room for all
        line.connect(first.name)
        line.sendall(first.key + rank.to_bytes(_RANK_BYTES, "little"), socket.MSG_NOSIGNAL)
    except OSError:
        line.close()
        raise
    return line


def _accept(listener: socket.socket, world_size: int, key: bytes) -> dict[int, socket.socket]:
    """The connections with all others, who have called; strangers are sent away.

    Raises:
        OSError: there are fewer, or the system has no room for them.
    """
    with ExitStack() as opened:
        lines: dict[int, socket.socket] = {}
        listener.setblocking(False)
        while len(lines) < world_size - 1:
            line, _ = listener.accept()
            told = b""
            line.setblocking(False)
            with suppress(OSError):
                told = line.recv(len(key) + _RANK_BYTES)
            rank = int.from_bytes(told[len(key) :], "little")
            if hmac.compare_digest(told[: len(key)], key) and 0 < rank < world_size and rank not in lines:
                lines[rank] = opened.enter_context(line)
            else:
                line.close()
        opened.pop_all()
        return lines
