"""What the saving benchmark measures, and what must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.states import TensorSpec, small_tensors, transformer

DCP, RESHARD, WRITE = "dcp", "reshard", "write"
"""Who saves while training waits: torch's library, this one, and the limit: a plain parallel write of the same bytes."""

DCP_ASYNC, COPY, DEFERRED, IDLE, MEMCPY = "dcp_async", "copy", "deferred", "idle", "memcpy"
"""What training waits for: torch's asynchronous save; ours in *copy*, in *deferred* when the next step comes at once, and in *deferred*
when the cores are idle for ten times the limit before the step; and the limit, a copy in memory."""

NO_SAVE = "none"
"""Who trains without saving: the others train with a checkpoint after every step."""

# A step of training for which the cores are idle, in copies of the state: what a step on an accelerator is at the least.
IDLE_COPIES = 10

# AdamW has two moments beside each weight.
MOMENTS = 3

# Of the saves without end: from which one on memory is compared, and up to which; and what each may add to anonymous memory (bytes).
SAVES_BEFORE, SAVES = 50, 200
MOST_GROWTH = 10_000

# Of so large a part of the transformer.
_ENDLESS_SCALE = 0.02


@dataclass(frozen=True)
class SaveCase:
    """One thing to measure.

    Attributes:
        name: for the command line and the JSON.
        title: for people; `{tensors}` in it is the number of tensors.
        kind: `sync`: whole saves; `stall`: what training waits for; `endless`: saves without end; `training`: steps with a save after each.
        tensors: the weights, of a scale.
        on_disk: whether checkpoints lie on a disk, not in memory.
        contenders: who is measured, by turns.
        targets: ratios: whose time, divided by whose, may be at most what (None: it is only reported).
        is_fresh: whether each save is the first one of a manager, so that planning is part of it.
    """

    name: str
    title: str
    kind: str
    tensors: Callable[[float], tuple[TensorSpec, ...]]
    on_disk: bool = False
    contenders: tuple[str, ...] = ()
    targets: tuple[tuple[str, str, float | None], ...] = ()
    is_fresh: bool = False


def _small(scale: float) -> tuple[TensorSpec, ...]:
    return small_tensors(max(4, round(10_000 * scale)))


_SYNC = (DCP, RESHARD, WRITE)

CASES = (
    SaveCase("memory", "saving to memory", "sync", transformer, False, _SYNC, ((RESHARD, WRITE, 1.3), (DCP, WRITE, None))),
    SaveCase("disk", "saving to disk", "sync", transformer, True, _SYNC, ((RESHARD, WRITE, 1.15), (DCP, WRITE, None))),
    SaveCase(
        "stall",
        "what training waits for",
        "stall",
        lambda scale: transformer(scale / MOMENTS),
        contenders=(DCP_ASYNC, COPY, DEFERRED, IDLE, MEMCPY),
        targets=((COPY, MEMCPY, 1.2), (DEFERRED, MEMCPY, 1.2), (IDLE, MEMCPY, 0.1), (DCP_ASYNC, MEMCPY, None)),
    ),
    SaveCase("small", "{tensors} tensors of 4 KB", "sync", _small, False, (DCP, RESHARD), ((RESHARD, DCP, 0.025),), is_fresh=True),
    SaveCase(
        "training",
        "training, a checkpoint after every step",
        "training",
        lambda _: (),  # its model is one that runs: see `save_training`
        contenders=(NO_SAVE, DEFERRED, COPY, DCP_ASYNC),
        targets=((DEFERRED, NO_SAVE, None), (COPY, NO_SAVE, None), (DCP_ASYNC, NO_SAVE, None)),
    ),
    SaveCase("endless", "saves without end", "endless", lambda scale: transformer(scale * _ENDLESS_SCALE)),
)
