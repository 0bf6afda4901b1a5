"""How long the ranks of a run that is to stop wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

# Seconds between two looks at the board while nothing happens: a wish is known everywhere within that.
_IDLE = 0.5

# And while a stop is being agreed on: training stands still meanwhile.
_BUSY = 0.05

# Looks per second that all ranks together may cost the job's store, which answers some 10,000 to 20,000 questions in that time.
_LOOKS = 4000

# Of the time that there is, this part may pass until every rank has pledged: a rank does so however long its step takes, so one that
# doesn't is dead, or not in its loop.
_PLEDGES = 1 / 3

# Seconds that ranks wait for a long step of another one when nobody is about to kill them: the time limit of a collective.
_PATIENCE = 1800.0

# Rank 0 may have heard of the wish later than the others (seconds).
_SLACK = 3.0


@dataclass(frozen=True)
class Limits:
    """The time limits of a job.

    Attributes:
        timeout: seconds from an urgent wish to the moment at which all ranks have agreed.
        world_size: the number of ranks.
    """

    timeout: float
    world_size: int

    def interval(self, *, busy: bool) -> float:
        """Seconds between two looks at the board."""
        return max(_BUSY if busy else _IDLE, self.world_size / _LOOKS)

    def for_pledges(self) -> float:
        """Seconds from the first wish until every rank must have pledged."""
        return max(self.timeout * _PLEDGES, 3 * self.interval(busy=False))

    def for_arrivals(self, *, urgent: bool) -> float:
        """Seconds from the wish until every rank must have arrived."""
        return self.timeout if urgent else max(self.timeout, _PATIENCE)

    def for_rank_0(self, *, urgent: bool) -> float:
        """Seconds from the wish until another rank gives rank 0 up."""
        return self.for_arrivals(urgent=urgent) + max(_SLACK, 2 * self.interval(busy=False))
