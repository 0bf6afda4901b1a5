"""Rank 0's part in the end of a run: it finds the step after which all stop."""

from __future__ import annotations

from reshard.stopping.limits import Limits
from reshard.stopping.notices import Decision, Notices

# So many ranks are named in a message.
_RANKS_SHOWN = 8


class Chair:
    """Collects what the ranks say, and decides once.

    Every rank first pledges to go no further than the step in which it is. The highest of these steps is one that no rank has passed, and
    that every rank can reach, since all others are only held at the end of an earlier one. When all stand there they stop.

    Args:
        notices: rank 0's.
        limits: how long it waits.
    """

    def __init__(self, notices: Notices, limits: Limits) -> None:
        self._notices = notices
        self._limits = limits
        self._not_pledged = set(range(limits.world_size))
        self._not_arrived = set(range(limits.world_size))
        self._pledges: dict[int, int] = {}
        self._arrivals: dict[int, int] = {}
        self._target: int | None = None

    def look(self, since: float, urgent_since: float | None) -> Decision | None:
        """Look at what the ranks have said since the last time.

        Args:
            since: seconds since the first wish was heard.
            urgent_since: seconds since an urgent one was; None: none was.

        Returns:
            A decision, when there is a new one.
        """
        if self._target is None:
            return self._look_at_pledges(since)
        left = self._notices.collect("arrival", self._not_arrived, self._arrivals)
        if left is not None:
            return _over(left)
        if not self._not_arrived:
            return self._stop()
        urgent = urgent_since is not None
        waited = urgent_since if urgent_since is not None else since
        limit = self._limits.for_arrivals(urgent=urgent)
        if waited > limit:
            who = _named(self._not_arrived)
            return Decision("failed", details=f"{who} did not come to the end of step {self._target} within {limit:g} s")
        return None

    def _look_at_pledges(self, since: float) -> Decision | None:
        left = self._notices.collect("pledge", self._not_pledged, self._pledges)
        if left is not None:
            return _over(left)
        if not self._not_pledged:
            self._target = max(self._pledges.values())
            return Decision("target", self._target)
        limit = self._limits.for_pledges()
        if since > limit:
            return Decision("failed", details=f"{_named(self._not_pledged)} did not say within {limit:g} s in which step it is")
        return None

    def _stop(self) -> Decision:
        steps = sorted(set(self._arrivals.values()))
        if len(steps) == 1:
            return Decision("stop", steps[0])
        return Decision("failed", details=f"ranks stopped after different steps: {', '.join(map(str, steps))}")


def _over(rank: int) -> Decision:
    return Decision("over", details=f"rank {rank} has come to the end of its loop")


def _named(ranks: set[int]) -> str:
    first = sorted(ranks)[:_RANKS_SHOWN]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, first)) + (", …" if len(ranks) > len(first) else "")
