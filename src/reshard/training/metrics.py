"""`metrics.jsonl`: what a run did, one JSON object per line.

A line with `event` says what happened (`start`, `save`, `stop`, `end`; `saving`: a save in the background has begun); a line without is a
step. A run that is resumed goes on in the same file
with another `start`, so that steps which it repeats stand there twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reshard.errors import StorageError

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: its number, from 1.
        loss: the mean loss over the global batch, before the step.
        lr: the learning rate that it used.
        grad_norm: the global norm of the gradient before clipping.
        tokens: tokens of the global batch.
        seconds: how long it took, saving apart.
        consumed_samples: samples that the run has seen since it began.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    consumed_samples: int


@dataclass(frozen=True)
class Segment:
    """What one start of a run wrote.

    Attributes:
        start: the line with which it began: `ranks`, `strategy`, `resumed_from` (a step, or None), `checkpoint`, …
        steps: its steps.
        events: its other events.
    """

    start: dict[str, Any]
    steps: list[StepMetrics] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)


class MetricsFile:
    """Appends lines; each is on disk when the call returns.

    Raises:
        StorageError: the folder or the file can't be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise StorageError(
                f"the metrics can't be written: {error.strerror}", file=self.path, fix="choose another output_dir"
            ) from error
        # A run that died while it wrote leaves half a line: the next one begins on its own.
        if self._file.seek(0, os.SEEK_END) > 0:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def step(self, metrics: StepMetrics) -> None:
        """Note a step."""
        # JSON has no word for what isn't finite.
        self._append({name: value if math.isfinite(value) else None for name, value in asdict(metrics).items()})

    def event(self, name: str, **facts: Any) -> None:
        """Note an event."""
        self._append({"event": name, **facts})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        os.fsync(self._file.fileno())


def read_metrics(path: str | Path) -> list[Segment]:
    """The segments of a metrics file, in the order in which they were written; half a line that a killed run left is passed over."""
    segments: list[Segment] = []
    for line in _lines(Path(path)):
        event = line.pop("event", None)
        if event == "start":
            segments.append(Segment(line))
        elif not segments:
            continue
        elif event is None:
            values: dict[str, Any] = {name: math.nan if value is None else value for name, value in line.items()}
            segments[-1].steps.append(StepMetrics(**values))
        else:
            segments[-1].events.append({"event": event, **line})
    return segments


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line
