"""The learning rate by the number of the step, whatever the framework."""

from __future__ import annotations

import math
from collections.abc import Callable

from reshard.config.fields import RunConfig


def learning_rate_factor(run: RunConfig, max_steps: int) -> Callable[[int], float]:
    """What the peak learning rate is multiplied by, by the number of steps done before."""
    schedule = run.lr_schedule
    warmup = schedule.warmup_steps
    total = max_steps if schedule.total_steps == -1 else schedule.total_steps
    floor = schedule.lr_end / run.learning_rate

    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        if schedule.type == "ConstantWarmUpLR":
            return 1.0
        progress = min(1.0, (done - warmup) / max(1, total - warmup))
        remaining = 1.0 - progress if schedule.type == "LinearWithWarmUpLR" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return floor + (1.0 - floor) * remaining

    return factor
