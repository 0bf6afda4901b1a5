"""The training loop: builds what the configuration describes, resumes, steps, and tells the callbacks."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from signal import Signals
from typing import Any

from reshard.checkpoint import Checkpoint
from reshard.config.fields import CheckpointMonitor, Framework, LossMonitor, RunConfig
from reshard.config.sizes import batch_sizes
from reshard.config.validation import Configuration
from reshard.errors import NoAgreementError, ReshardError
from reshard.loading.report import RestoreReport
from reshard.manager import CheckpointManager
from reshard.saving.policies import KeepAny, KeepBest, KeepEvery, KeepFor, KeepPolicy
from reshard.sources.legacy.saved_under import SavedUnder
from reshard.sources.resolve import list_iterations
from reshard.stopping.graceful import GracefulStop
from reshard.storage.posix import PosixStorage
from reshard.training.callbacks import Callback, CheckpointCallback, MetricsCallback, all_callbacks
from reshard.training.corpus import open_corpus
from reshard.training.learner import Learner
from reshard.training.metrics import METRICS_FILE, MetricsFile, StepMetrics
from reshard.training.named import named_checkpoint
from reshard.training.outcome import STOPPED_FILE, Outcome, read_outcome, write_outcome
from reshard.training.pretrained import load_pretrained
from reshard.training.progress import Progress
from reshard.training.samples import SampleStream

# A name that only checkpoints of MindSpore have, and all of them.
_OF_MINDSPORE = "embedding.word_embeddings.weight"


class Trainer:
    """One rank's side of a run.

    Args:
        configuration: what to do.
        learner: this rank's model, in its framework.

    Raises:
        ConfigError: something that only shows when it is built (no data, sizes that don't fit).
    """

    def __init__(self, configuration: Configuration, learner: Learner) -> None:
        run = configuration.run
        self._run = run
        self._notes = configuration.notes
        self._learner = learner
        self._batch = batch_sizes(run, learner.sizes)
        self.stream = SampleStream(open_corpus(run.train_dataset.path), run.train_dataset.seq_length, run.seed)
        self.max_steps = run.runner_config.max_steps or math.ceil(run.runner_config.epochs * self.stream.windows / self._batch.total)
        learner.plan(self.max_steps)
        self.model, self.optimizer, self.scheduler = learner.model, learner.optimizer, learner.scheduler
        self.done = 0
        learner.seed(0)

    def train(self) -> Outcome:
        """Resume or begin, and train to the last step, or until the run is told to stop.

        Raises:
            ReshardError: what was to be loaded can't be, or a save failed.
        """
        began = time.monotonic()
        with ExitStack() as open_things:
            every = next((callback.per_print_times for callback in self._run.callbacks if isinstance(callback, LossMonitor)), 1)
            progress = open_things.enter_context(Progress(self.max_steps, every, shown=self._learner.rank == 0))
            for note in self._notes:
                progress.note(note)
            progress.note(self._introduction())
            manager = open_things.enter_context(_manager(self._run))
            resumed = self._resume(manager, progress)
            if resumed is None and manager is not None and self._learner.rank == 0:
                _warn_of_other_run(manager.directory, progress)
            metrics = None
            if self._learner.rank == 0:
                metrics = MetricsFile(os.path.join(self._run.output_dir, METRICS_FILE))
                open_things.callback(metrics.close)
                metrics.event("start", **self._start_facts(resumed))
                self._forget_last_stop(progress)
            saving = self._checkpoint_callback(manager, progress, metrics)
            callbacks = all_callbacks((MetricsCallback(progress, metrics), saving))
            if self.done >= self.max_steps:
                progress.note(f"nothing to do: the run is at step {self.done} of {self.max_steps}")
                return Outcome("finished", self.done)
            stop = open_things.enter_context(self._stop(began))
            outcome = self._steps(callbacks, stop, progress)
            if outcome.details is None:
                # Only together with the other ranks, and they have lost each other otherwise.
                for callback in reversed(callbacks):
                    callback.on_end()
                outcome = replace(outcome, saved=saving is not None, reason=stop.reason)
            if outcome.state == "stopped":
                progress.note(f"stopped {outcome}")
                if metrics is not None:
                    metrics.event("stop", step=outcome.step, reason=outcome.reason, saved=outcome.saved)
                    write_outcome(self._stopped_file, outcome)
            return outcome

    def _steps(self, callbacks: tuple[Callback, ...], stop: GracefulStop, progress: Progress) -> Outcome:
        while self.done < self.max_steps:
            result = self.step()
            for callback in callbacks:
                callback.on_step(result)
            try:
                if self.done < self.max_steps and stop.should_stop(self.done):
                    progress.note(f"stopping after step {self.done}: {stop.reason}")
                    return Outcome("stopped", self.done)
            except NoAgreementError as error:
                if stop.reason not in Signals.__members__:
                    raise
                progress.note(str(error))
                return Outcome("stopped", self.done, stop.reason, details=str(error))
        return Outcome("finished", self.done)

    def _stop(self, began: float) -> GracefulStop:
        minutes = self._run.stop_after_minutes
        if minutes is not None:
            # Counted from the beginning: loading is a part of it. What is over already is over at once.
            minutes = max(minutes - (time.monotonic() - began) / 60, 1e-6)
        return GracefulStop(after_minutes=minutes, timeout=self._run.stop_timeout)

    @property
    def _stopped_file(self) -> str:
        return os.path.join(self._run.output_dir, STOPPED_FILE)

    def _forget_last_stop(self, progress: Progress) -> None:
        """What the file says is about the run before; a run that is under way hasn't stopped."""
        last = read_outcome(self._stopped_file)
        if last is not None:
            progress.note(f"the run before stopped {last}")
        with suppress(FileNotFoundError):
            os.remove(self._stopped_file)

    def step(self) -> StepMetrics:
        """One optimizer step."""
        started = time.perf_counter()
        samples = self.stream.next_batch(self._batch.total, self._learner.data_index, self._learner.sizes.data)
        learned = self._learner.learn(samples)
        self.done += 1
        return StepMetrics(
            step=self.done,
            loss=learned.loss,
            lr=learned.lr,
            grad_norm=learned.grad_norm,
            tokens=self._batch.total * self._run.train_dataset.seq_length,
            seconds=time.perf_counter() - started,
            consumed_samples=self.stream.consumed_samples,
        )

    def parts(self) -> dict[str, Any]:
        """What a checkpoint of this run consists of: the manager's arguments."""
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "dataloader": self.stream}

    def _resume(self, manager: CheckpointManager | None, progress: Progress) -> RestoreReport | None:
        run = self._run
        if run.resume == "auto":
            assert manager is not None  # validation: `auto` needs a monitor
            report = manager.load(missing_ok=True, **self._how(manager.directory), **self._loaded_parts())
            if report is not None:
                return self._continue(report, "resume: auto: continuing from", progress)
            progress.note(f"resume: auto: no checkpoint in {manager.directory}, a fresh start")
        if not run.load_checkpoint:
            if run.pretrained_model_dir:
                report, notes = load_pretrained(run.pretrained_model_dir, self.model, run.model, run.framework, balanced=run.balanced_load)
                for note in (f"pretrained_model_dir: weights of {report}", *notes):
                    progress.note(note)
            return None
        reader = manager if manager is not None else CheckpointManager(run.load_checkpoint, read_only=True)
        named = named_checkpoint(run)
        try:
            if run.resume_training:
                report = reader.load(named, **self._how(named), **self._loaded_parts())
                assert report is not None
                return self._continue(report, "resume_training: continuing from", progress)
            report = reader.load(named, model=self.model, restore_random=False, **self._how(named))
            progress.note(f"load_checkpoint: weights of {report}; optimizer, schedule and data begin anew")
            return None
        finally:
            if reader is not manager:
                reader.close()

    def _how(self, path: str | SavedUnder) -> dict[str, Any]:
        run = self._run
        return {
            "balanced": run.balanced_load,
            "on_corrupt": run.on_corrupt,
            "skip_unhealthy": run.skip_unhealthy,
            "mapping": run.model.model_type if _is_of_other_framework(path, run.framework) else None,
        }

    def _loaded_parts(self) -> dict[str, Any]:
        parts = self.parts()
        if self._run.no_load_optim:
            parts["optimizer"] = None
        return parts

    def _continue(self, report: RestoreReport, how: str, progress: Progress) -> RestoreReport:
        common = report.common
        step = common.global_step if common is not None and common.global_step is not None else report.iteration
        self.done = step or 0
        progress.note(f"{how} {report}")
        for one in report.passed_over:
            progress.note(f"passed over {one}: {one.path}: {' '.join(one.details.split())}")
        progress.resumed(self.done)
        if self._learner.go_to_step(self.done):
            progress.note(f"the schedule was put after step {self.done}")
        if self.stream.consumed_samples == 0 and self.done > 0:
            known = common.consumed_samples if common is not None else None
            self.stream.consumed_samples = known if known is not None else self.done * self._batch.total
            progress.note(f"the data were put after {self.stream.consumed_samples} samples")
        if report.random != "restored":
            self._learner.seed(self.done)
            progress.note(
                f"random numbers go on from the seed, step {self.done} and each rank's place: strategy or framework is another one"
            )
        for note in self.stream.notes:
            progress.note(note)
        if common is not None and common.global_batch_size not in (None, self._batch.total):
            progress.note(f"a step had {common.global_batch_size} samples and now has {self._batch.total}")
        return report

    def _checkpoint_callback(
        self, manager: CheckpointManager | None, progress: Progress, metrics: MetricsFile | None
    ) -> CheckpointCallback | None:
        monitor = self._run.monitor
        if manager is None or monitor is None or monitor.save_checkpoint_steps is None:
            return None
        return CheckpointCallback(
            manager,
            monitor.save_checkpoint_steps,
            # By the configuration an export needs none other.
            {**self.parts(), "extra": {"config": self._learner.config()}},
            windows=self.stream.windows,
            global_batch_size=self._batch.total,
            progress=progress,
            metrics=metrics,
        )

    def _introduction(self) -> str:
        settings = self._run.model
        batch = self._batch
        return (
            f"{settings.model_type} of {settings.num_hidden_layers} layers, width {settings.hidden_size}, on {self._learner.sizes.ranks} "
            f"rank{'s' if self._learner.sizes.ranks > 1 else ''} ({self._learner.sizes}); steps of {batch.total} samples of "
            f"{self._run.train_dataset.seq_length} tokens; data: {self.stream.corpus.name}, {self.stream.corpus.size / 1e6:.1f} MB"
        )

    def _start_facts(self, resumed: RestoreReport | None) -> dict[str, Any]:
        sizes = self._learner.sizes
        return {
            "time": time.time(),
            "framework": self._run.framework,
            "ranks": sizes.ranks,
            "strategy": str(sizes),
            "resumed_from": None if resumed is None else self.done,
            "checkpoint": None if resumed is None else resumed.directory,
            "max_steps": self.max_steps,
            "global_batch_size": self._batch.total,
        }


def _warn_of_other_run(directory: str, progress: Progress) -> None:
    there = list_iterations(PosixStorage(), directory)
    if there:
        progress.note(
            f"{directory} holds iterations {there[0][0]} to {there[-1][0]} of an earlier run, which this one will replace step by step; "
            "resume: auto would have continued it"
        )


def _is_of_other_framework(path: str | SavedUnder, framework: Framework) -> bool:
    """Whether a checkpoint has the names that models have in the other framework."""
    try:
        checkpoint = Checkpoint(path)
    except ReshardError:
        # The load itself says what is wrong with it.
        return False
    return (_OF_MINDSPORE in checkpoint) != (framework == "mindspore")


@contextmanager
def _manager(run: RunConfig) -> Iterator[CheckpointManager | None]:
    """The manager of the run's own root, if the configuration has a CheckpointMonitor; one that only reads where nothing is to be saved."""
    monitor = run.monitor
    if monitor is None:
        yield None
        return
    directory = monitor.directory or os.path.join(run.output_dir, "checkpoint")
    with CheckpointManager(
        directory,
        prefix=monitor.prefix,
        keep_checkpoint_max=monitor.keep_checkpoint_max,
        keep=_keep(monitor),
        remove_redundancy=monitor.remove_redundancy,
        check_replicas=monitor.check_replicas,
        async_save=monitor.async_save,
        save_optimizer=monitor.save_optimizer,
        read_only=monitor.save_checkpoint_steps is None,
    ) as manager:
        yield manager


def _keep(monitor: CheckpointMonitor) -> KeepPolicy | None:
    """What is kept besides the newest."""
    policies: list[KeepPolicy] = []
    if monitor.keep_checkpoint_every is not None:
        policies.append(KeepEvery(monitor.keep_checkpoint_every))
    if monitor.keep_checkpoint_days is not None:
        policies.append(KeepFor(days=monitor.keep_checkpoint_days))
    best = monitor.keep_checkpoint_best
    if best is not None:
        policies.append(KeepBest(best.metric, best.count, best.mode))
    return KeepAny(tuple(policies)) if policies else None
