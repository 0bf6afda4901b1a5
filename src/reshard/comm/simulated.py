"""A cluster whose ranks are threads of one process: for tests, and for plans that are tried before they are run."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict

from reshard.comm.single import LocalBoard
from reshard.errors import CommunicationError

# A simulated rank that waits this long (seconds) waits for one that will never come: real work between two collectives of a test takes
# milliseconds, on a loaded machine seconds.
DEFAULT_TIMEOUT = 60.0

# How often (seconds) a rank that waits for a message looks whether another has died.
_GLANCE = 0.05


class SimulatedCluster:
    """The common ground of N ranks; `communicator(rank)` gives each its own end."""

    def __init__(self, world_size: int, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self.collectives = 0
        self._board: list[bytes] = [b""] * world_size
        self._gathered: list[bytes] = []
        self._arrived = 0
        self._aborted = False
        self._turn = threading.Condition()
        self._queues: defaultdict[tuple[int, int], queue.SimpleQueue[bytes]] = defaultdict(queue.SimpleQueue)
        self._lock = threading.Lock()
        self._notices: dict[tuple[str, int | None], bytes] = {}
        self._twins: list[SimulatedCluster] = []

    def communicator(self, rank: int) -> SimulatedCommunicator:
        """The end of one rank."""
        return SimulatedCommunicator(self, rank)

    def abort(self) -> None:
        """Wake every rank that waits in a collective with a CommunicationError: a rank has died."""
        with self._turn:
            self._aborted = True
            self._turn.notify_all()
        for twin in self._twins:
            twin.abort()

    def _twin(self, number: int) -> SimulatedCluster:
        """The cluster of the n-th duplicate of every rank's communicator."""
        with self._lock:
            while len(self._twins) <= number:
                twin = SimulatedCluster(self.world_size, self.timeout)
                twin._notices = self._notices
                twin._aborted = self._aborted
                self._twins.append(twin)
            return self._twins[number]

    def _exchange(self, rank: int, data: bytes) -> list[bytes]:
        with self._turn:
            round_ = self.collectives
            self._board[rank] = data
            self._arrived += 1
            if self._arrived == self.world_size:
                self._gathered = list(self._board)
                self._arrived = 0
                self.collectives += 1
                self._turn.notify_all()
            # A round that is complete counts, whatever happens to its ranks afterwards. The next one can't complete, and write over what
            # was gathered, before this rank has come to it too.
            self._turn.wait_for(lambda: self._aborted or self.collectives > round_, self.timeout)
            if self.collectives > round_:
                return self._gathered
        raise CommunicationError(
            "a rank is gone: the others can't go on",
            rank=rank,
            expected=f"{self.world_size} ranks within {self.timeout:g} s",
            fix="look at the rank that failed first",
        )

    def _queue(self, source: int, target: int) -> queue.SimpleQueue[bytes]:
        with self._lock:
            return self._queues[source, target]


class SimulatedCommunicator:
    """One rank's end of a simulated cluster."""

    def __init__(self, cluster: SimulatedCluster, rank: int) -> None:
        self._cluster = cluster
        self._duplicates = 0
        self.rank = rank
        self.world_size = cluster.world_size

    def all_gather(self, data: bytes) -> list[bytes]:
        return self._cluster._exchange(self.rank, bytes(data))

    def broadcast(self, data: bytes, source: int = 0) -> bytes:
        return self._cluster._exchange(self.rank, bytes(data) if self.rank == source else b"")[source]

    def barrier(self) -> None:
        self._cluster._exchange(self.rank, b"")

    def send(self, data: bytes | memoryview, target: int) -> None:
        self._cluster._queue(self.rank, target).put(bytes(data))

    def recv(self, source: int) -> bytes:
        sent = self._cluster._queue(source, self.rank)
        deadline = time.monotonic() + self._cluster.timeout
        while True:
            try:
                return sent.get(timeout=_GLANCE)
            except queue.Empty:
                if not self._cluster._aborted and time.monotonic() < deadline:
                    continue
            raise CommunicationError(
                "a rank sent nothing", rank=self.rank, expected=f"bytes from rank {source} within {self._cluster.timeout:g} s"
            )

    def duplicate(self) -> SimulatedCommunicator:
        number, self._duplicates = self._duplicates, self._duplicates + 1
        return self._cluster._twin(number).communicator(self.rank)

    def board(self) -> LocalBoard:
        return LocalBoard(self.rank, self._cluster._notices)

    def close(self) -> None:
        return None
