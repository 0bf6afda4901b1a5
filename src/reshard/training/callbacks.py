"""What happens beside training: a callback is told of every step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Protocol

from reshard.comm.together import attempt
from reshard.format.common import CommonInfo
from reshard.manager import CheckpointManager
from reshard.saving.report import SaveReport
from reshard.training.metrics import MetricsFile, StepMetrics
from reshard.training.progress import Progress


class Callback(Protocol):
    """Something that follows a run. Every rank calls it at the same points."""

    def on_step(self, metrics: StepMetrics) -> None:
        """An optimizer step is done; the schedule and the data stand after it."""
        ...

    def on_end(self) -> None:
        """No more steps: the last one is done, or the run stops."""
        ...


class CheckpointCallback:
    """Saves every so many steps, and after the last one.

    Of a save in the background it says at once how long training stood still for it, and that it is committed when it is asked for next: at
    the next save, or at the end.

    Args:
        manager: saves.
        every: steps between two saves.
        parts: what is saved: the arguments `model`, `optimizer`, `scheduler`, `dataloader`, `extra` of the manager's `save`.
        windows: samples of an epoch.
        global_batch_size: samples of a step.
        progress: is told.
        metrics: is told, on rank 0.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        every: int,
        parts: dict[str, Any],
        *,
        windows: int,
        global_batch_size: int,
        progress: Progress,
        metrics: MetricsFile | None,
    ) -> None:
        self._manager = manager
        self._every = every
        self._parts = parts
        self._windows = windows
        self._global_batch_size = global_batch_size
        self._progress = progress
        self._metrics = metrics
        self._last: StepMetrics | None = None
        self._saved: int | None = None
        # What a save in the background has cost training, until it is committed.
        self._stalled: float | None = None

    def on_step(self, metrics: StepMetrics) -> None:
        self._last = metrics
        if metrics.step % self._every == 0:
            self._save(metrics)

    def on_end(self) -> None:
        if self._last is not None and self._saved != self._last.step:
            # One that failed in the background is no reason not to save the last step.
            _, failed = attempt(self._settle)
            if failed is not None:
                self._progress.note(f"the save before failed; step {self._last.step} is saved all the same. {failed}")
            self._save(self._last)
        self._settle()

    def _save(self, metrics: StepMetrics) -> None:
        began = time.perf_counter()
        self._settle()
        self._progress.saving(metrics.step)
        numbers = {"loss": metrics.loss, "grad_norm": metrics.grad_norm}
        report = self._manager.save(metrics.step, **self._parts, common=self._common(metrics), metrics=numbers)
        self._saved = metrics.step
        if report.state == "committed":
            self._committed(report)
            return
        self._stalled = time.perf_counter() - began
        self._progress.under_way(metrics.step, self._stalled)
        if self._metrics is not None:
            self._metrics.event("saving", step=metrics.step, stalled=self._stalled)

    def _settle(self) -> None:
        """Wait for a save in the background, if one is under way, and say what became of it."""
        stalled, self._stalled = self._stalled, None
        report = self._manager.wait()
        if stalled is not None and report is not None:
            self._committed(report, stalled=stalled)

    def _committed(self, report: SaveReport, **more: float) -> None:
        self._progress.saved(report.step, report.seconds, report.nbytes)
        if self._metrics is not None:
            self._metrics.event("save", step=report.step, seconds=report.seconds, nbytes=report.nbytes, directory=report.directory, **more)

    def _common(self, metrics: StepMetrics) -> CommonInfo:
        healthy = math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)
        return CommonInfo(
            epoch_num=metrics.consumed_samples // self._windows,
            step_num=metrics.step,
            global_step=metrics.step,
            global_batch_size=self._global_batch_size,
            consumed_samples=metrics.consumed_samples,
            ckpt_status=0 if healthy else 1,
        )


class MetricsCallback:
    """Writes every step to the metrics file and shows it."""

    def __init__(self, progress: Progress, metrics: MetricsFile | None) -> None:
        self._progress = progress
        self._metrics = metrics

    def on_step(self, metrics: StepMetrics) -> None:
        if self._metrics is not None:
            self._metrics.step(metrics)
        self._progress.step(metrics)
        if not math.isfinite(metrics.loss):
            self._progress.note(f"step {metrics.step}: the loss is {metrics.loss}; checkpoints from here on are marked as unhealthy")

    def on_end(self) -> None:
        if self._metrics is not None:
            self._metrics.event("end")


def all_callbacks(callbacks: Sequence[Callback | None]) -> tuple[Callback, ...]:
    """Those that there are, in the order in which they are told."""
    return tuple(callback for callback in callbacks if callback is not None)
