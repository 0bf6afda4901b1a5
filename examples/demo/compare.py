"""What the demo's runs show, worked out from their files alone: no torch, no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runs import Run

import reshard
from reshard.training.metrics import METRICS_FILE, Segment, read_metrics


@dataclass(frozen=True)
class Comparison:
    """A run beside its reference.

    Attributes:
        run: its name.
        segments: what each start of it wrote.
        largest: the largest |loss - reference| / reference over all its steps, repeated ones included.
        steps: how many steps were compared.
    """

    run: str
    segments: list[Segment]
    largest: float
    steps: int


def segments_of(run: Run) -> list[Segment]:
    """What each start of a run wrote."""
    return read_metrics(run.folder / METRICS_FILE)


def losses_of(run: Run) -> dict[int, float]:
    """The loss of every step of an uninterrupted run."""
    return {metrics.step: metrics.loss for segment in segments_of(run) for metrics in segment.steps}


def deviations(segment: Segment, reference: dict[int, float]) -> Iterator[tuple[int, float]]:
    """The relative deviation of each step's loss."""
    for metrics in segment.steps:
        yield metrics.step, abs(metrics.loss - reference[metrics.step]) / abs(reference[metrics.step])


def compare(run: Run, reference: dict[int, float]) -> Comparison:
    """Hold every loss of a run against the reference's."""
    segments = segments_of(run)
    found = [deviation for segment in segments for _, deviation in deviations(segment, reference)]
    return Comparison(run.name, segments, max(found), len(found))


def differing_tensors(run: Run, reference: Run) -> tuple[int, list[str]]:
    """The tensors (weights and optimizer) of two runs' last checkpoints: how many there are, and which differ in any byte."""
    mine, theirs = reshard.Checkpoint(str(run.root)), reshard.Checkpoint(str(reference.root))
    names = sorted(set(mine) | set(theirs))
    differing = [
        name for name in names if name not in mine or name not in theirs or mine[name][...].tobytes() != theirs[name][...].tobytes()
    ]
    return len(names), differing
