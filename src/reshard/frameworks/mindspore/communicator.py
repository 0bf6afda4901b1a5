"""The ranks of a MindSpore run: found through one broadcast of MindSpore's own, and from then on apart from training's collectives.

On the CPU few of MindSpore's collectives exist, none works in a group of its own, and all share connections with training's, so that
another thread can't use them. So the ranks talk over sockets; MindSpore's broadcast, which all its backends have (mccl, hccl, nccl), tells
where.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from typing import Any

import msgspec
import numpy as np

from reshard.comm import Communicator, SingleProcess
from reshard.comm.sockets import Endpoint, SocketCommunicator
from reshard.errors import CommunicationError

DEFAULT_TIMEOUT = 1800.0
"""Seconds without an answer after which a rank is taken for gone."""

# Room for an address, a port and the key, in a row of int32, which every backend can broadcast.
_ROOM = 256


class _Meeting(msgspec.Struct, array_like=True):
    host: str
    port: int
    key: bytes


def connect(timeout: float = DEFAULT_TIMEOUT) -> Communicator:
    """A communicator over the ranks of a MindSpore run, or of a single process where its communication isn't initialised. Collective.

    Args:
        timeout: seconds that a collective or a message may take.

    Raises:
        CommunicationError: the ranks don't reach each other.
    """
    if not is_initialized():
        return SingleProcess()
    from mindspore import communication

    rank, world_size = communication.get_rank(), communication.get_group_size()
    if world_size == 1:
        return SingleProcess()
    host = _own_address()
    # The key travels on the way that the job's own data take.
    key = secrets.token_bytes(32) if rank == 0 else b""
    endpoint = Endpoint(rank, world_size, host, key, timeout) if rank == 0 else None
    mine = _Meeting(*endpoint.address, key) if endpoint is not None else _Meeting("", 0, b"")
    meeting = msgspec.msgpack.decode(_broadcast(msgspec.msgpack.encode(mine)), type=_Meeting)
    if endpoint is None:
        endpoint = Endpoint(rank, world_size, host, meeting.key, timeout)
    communicator = SocketCommunicator(endpoint)
    endpoint.join((meeting.host, meeting.port))
    return communicator


def is_initialized() -> bool:
    """Whether MindSpore's communication is initialised. Doesn't import MindSpore."""
    module: Any = sys.modules.get("mindspore.communication")
    return module is not None and bool(module.GlobalComm.INITED)


def _broadcast(data: bytes) -> bytes:
    """Rank 0's bytes, by MindSpore."""
    from mindspore import Tensor, communication
    from mindspore.mint import distributed

    row = np.zeros(_ROOM, np.int32)
    row[: 1 + len(data)] = [len(data), *data]
    tensor = Tensor(row)
    try:
        distributed.broadcast(tensor, 0, group=communication.GlobalComm.WORLD_COMM_GROUP)
        row = tensor.asnumpy()
    except RuntimeError as error:
        raise CommunicationError(
            "MindSpore's broadcast failed: ranks can't find each other",
            rank=communication.get_rank(),
            found=str(error).strip().partition("\n")[0],
            fix="look at the other ranks' messages first: one of them may have ended; then start the run again",
        ) from error
    return bytes(row[1 : 1 + int(row[0])].astype(np.uint8))


def _own_address() -> str:
    """This machine's address on the network that leads to the scheduler of the job."""
    scheduler = os.environ.get("MS_SCHED_HOST")
    if scheduler is None:
        return socket.gethostbyname(socket.gethostname())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((scheduler, 9))  # nothing is sent: it only picks the way
        return str(probe.getsockname()[0])
