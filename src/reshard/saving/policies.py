"""What retention keeps: policies as plain data, each with one pure function over the committed iterations of a root.

Policies are joined by `|`: what any of them keeps stays.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from reshard.errors import UsageError

Mode = Literal["min", "max"]

_HOUR = 3600.0
_DAY = 24 * _HOUR


@dataclass(frozen=True)
class Committed:
    """A committed iteration, as a policy sees it.

    Attributes:
        step: its number.
        time: when it was committed; seconds since the epoch.
        metrics: the numbers that were saved with it; None when they can't be read, so that nobody can judge it by them.
    """

    step: int
    time: float
    metrics: Mapping[str, float] | None


class KeepPolicy(ABC):
    """Which committed iterations stay. Derive from it for a rule of your own.

    Attributes:
        needs_metrics: whether the policy looks at metrics: they are read for it only then.
    """

    needs_metrics: bool = False

    @abstractmethod
    def keeps(self, iterations: Sequence[Committed], now: float) -> frozenset[int]:
        """The steps of those that stay.

        Args:
            iterations: in the order in which they would go: those first that a run gave up when it went back, the newest last.
            now: seconds since the epoch.
        """
        ...

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        """The policy that keeps what either keeps."""
        if not isinstance(other, KeepPolicy):
            return NotImplemented
        return KeepAny((*_parts(self), *_parts(other)))


@dataclass(frozen=True)
class KeepNewest(KeepPolicy):
    """Keep those that were saved last.

    Attributes:
        count: how many.

    Raises:
        UsageError: less than one.
    """

    count: int

    def __post_init__(self) -> None:
        _check_count(self, "count", self.count)

    def keeps(self, iterations: Sequence[Committed], now: float) -> frozenset[int]:
        """As in `KeepPolicy`."""
        return frozenset(iteration.step for iteration in iterations[-self.count :])


@dataclass(frozen=True)
class KeepEvery(KeepPolicy):
    """Keep every iteration whose number is a multiple.

    Attributes:
        steps: of how many steps.

    Raises:
        UsageError: less than one.
    """

    steps: int

    def __post_init__(self) -> None:
        _check_count(self, "steps", self.steps)

    def keeps(self, iterations: Sequence[Committed], now: float) -> frozenset[int]:
        """As in `KeepPolicy`."""
        return frozenset(iteration.step for iteration in iterations if iteration.step % self.steps == 0)


@dataclass(frozen=True)
class KeepFor(KeepPolicy):
    """Keep those that are no older than this. Days and hours add up. Age counts from when `metadata.json` was last written, as the file
    system says: of a copy it may begin anew.

    Attributes:
        days: of 24 hours.
        hours: besides.

    Raises:
        UsageError: no time at all, or no number.
    """

    days: float = 0.0
    hours: float = 0.0

    def __post_init__(self) -> None:
        for field, value in (("days", self.days), ("hours", self.hours)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise _misfit(self, field, value, "a number, 0 or more")
        if not self.days and not self.hours:
            raise _misfit(self, "days", self.days, "more than 0, or hours")

    def keeps(self, iterations: Sequence[Committed], now: float) -> frozenset[int]:
        """As in `KeepPolicy`."""
        oldest = now - self.days * _DAY - self.hours * _HOUR
        return frozenset(iteration.step for iteration in iterations if iteration.time >= oldest)


@dataclass(frozen=True)
class KeepBest(KeepPolicy):
    """Keep those with the best values of a metric; of equal ones those that were saved last.

    One that was saved without the metric, or with a value that is not finite, is never among the best. One whose metrics can't be read
    stays.

    Attributes:
        metric: its name in `save(..., metrics={...})`.
        count: how many.
        mode: `min` when the least value is the best, `max` when the greatest is.

    Raises:
        UsageError: no name, less than one, or another mode.
    """

    metric: str
    count: int = 1
    mode: Mode = "min"

    needs_metrics = True

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise _misfit(self, "metric", self.metric, "the name of a metric")
        _check_count(self, "count", self.count)
        if self.mode not in ("min", "max"):
            raise _misfit(self, "mode", self.mode, "'min' or 'max'")

    def keeps(self, iterations: Sequence[Committed], now: float) -> frozenset[int]:
        """As in `KeepPolicy`."""
        sign = 1 if self.mode == "min" else -1
        judged: list[tuple[float, int, int]] = []
        unknown: set[int] = set()
        for place, iteration in enumerate(iterations):
            if iteration.metrics is None:
                unknown.add(iteration.step)
            elif math.isfinite(value := iteration.metrics.get(self.metric, math.nan)):
                judged.append((sign * value, -place, iteration.step))
        return frozenset(unknown | {step for _, _, step in sorted(judged)[: self.count]})


@dataclass(frozen=True)
class KeepAny(KeepPolicy):
    """Keep what any of several policies keeps; what `|` makes.

    Attributes:
        policies: the policies.

    Raises:
        UsageError: none, or something else.
    """

    policies: tuple[KeepPolicy, ...]

    def __post_init__(self) -> None:
        if not self.policies or not all(isinstance(policy, KeepPolicy) for policy in self.policies):
            raise _misfit(self, "policies", self.policies, "policies, at least one")

    @property
    def needs_metrics(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - it is only ever read
        """As in `KeepPolicy`."""
        return any(policy.needs_metrics for policy in self.policies)

    def keeps(self, iterations: Sequence[Committed], now: float) -> frozenset[int]:
        """As in `KeepPolicy`."""
        return frozenset().union(*(policy.keeps(iterations, now) for policy in self.policies))


def policy_of(keep_checkpoint_max: int | None, keep: KeepPolicy | None) -> KeepPolicy | None:
    """The policy that a number of the newest and a policy mean together: what either keeps. None when neither is given: all stay."""
    newest = None if keep_checkpoint_max is None else KeepNewest(keep_checkpoint_max)
    return newest | keep if newest is not None and keep is not None else newest or keep


def _parts(policy: KeepPolicy) -> tuple[KeepPolicy, ...]:
    return policy.policies if isinstance(policy, KeepAny) else (policy,)


def _check_count(policy: KeepPolicy, field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _misfit(policy, field, value, "a whole number, 1 or more")


def _misfit(policy: KeepPolicy, field: str, found: object, expected: str) -> UsageError:
    return UsageError(
        f"{type(policy).__name__} can't work with such a value",
        field=f"{type(policy).__name__}.{field}",
        found=repr(found),
        expected=expected,
    )
