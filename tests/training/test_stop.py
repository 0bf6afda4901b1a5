"""A run that is told to stop saves once more, says so, and goes on from there."""

from __future__ import annotations

import io
import json
import os
import signal
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.errors import SaveError
from reshard.training.metrics import StepMetrics, read_metrics
from reshard.training.outcome import EXIT_STOPPED, Outcome, read_outcome, write_outcome
from reshard.training.trainer import Trainer
from tests.training import ranks

STEPS = 8


def trainer(output: Path, *, monitor: dict[str, Any] | None = None, **fields: Any) -> Trainer:
    given = {
        "output_dir": str(output),
        "resume": "auto",
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 100, **(monitor or {})}],
        "runner_config": {"max_steps": STEPS, "batch_size": 4, "global_batch_size": 4},
        **fields,
    }
    configuration = ranks.settings(**given)
    return ranks.trainer_of(configuration)


def run(one: Trainer, *, signal_in: int | None = None) -> tuple[Outcome, str]:
    """Train; in the middle of one step a signal comes."""
    whole_step = one.step

    def step() -> StepMetrics:
        if one.done + 1 == signal_in:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return whole_step()

    one.step = step  # type: ignore[method-assign]
    shown = io.StringIO()
    with redirect_stdout(shown):
        outcome = one.train()
    return outcome, shown.getvalue()


def losses(output: Path) -> dict[int, float]:
    return {step.step: step.loss for segment in read_metrics(output / "metrics.jsonl") for step in segment.steps}


@pytest.mark.parametrize("async_save", [False, "copy", "deferred"])
def test_a_signal_saves_the_last_step_and_the_run_goes_on_from_there(tmp_path: Path, async_save: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monitor = {"async_save": async_save, "save_checkpoint_steps": 2}
    run(trainer(tmp_path / "straight"))
    outcome, shown = run(trainer(tmp_path / "out", monitor=monitor), signal_in=5)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (outcome.state, outcome.reason, outcome.saved, outcome.exit_code) == ("stopped", "SIGTERM", True, EXIT_STOPPED)
    assert outcome.step == 5
    assert f"stopped after step {outcome.step} (SIGTERM), which is saved" in shown
    assert reshard.Checkpoint(tmp_path / "out" / "checkpoint").iteration == outcome.step
    assert read_outcome(tmp_path / "out" / "stopped.json") == outcome
    assert json.loads((tmp_path / "out" / "stopped.json").read_text())["time"] > 0
    (segment,) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    stops = [event for event in segment.events if event["event"] == "stop"]
    assert stops == [{"event": "stop", "step": outcome.step, "reason": "SIGTERM", "saved": True}]
    saved = [event for event in segment.events if event["event"] == "save"]
    assert [event["step"] for event in saved] == [2, 4, 5]
    begun = [event["step"] for event in segment.events if event["event"] == "saving"]
    assert begun == ([event["step"] for event in saved] if async_save else [])
    assert all(("stalled" in event) is bool(async_save) for event in saved)

    finished, shown = run(trainer(tmp_path / "out", monitor=monitor))
    assert (finished.state, finished.step, finished.exit_code) == ("finished", STEPS, 0)
    assert f"the run before stopped after step {outcome.step} (SIGTERM), which is saved" in shown
    assert f"continuing from iteration {outcome.step}" in shown
    assert not (tmp_path / "out" / "stopped.json").exists()
    assert losses(tmp_path / "out") == losses(tmp_path / "straight")


def test_a_time_limit(tmp_path: Path) -> None:
    outcome, shown = run(trainer(tmp_path, stop_after_minutes=1e-6, runner_config={"max_steps": 100_000, "batch_size": 4}))
    assert (outcome.state, outcome.reason, outcome.saved, outcome.exit_code) == ("stopped", "time limit", True, EXIT_STOPPED)
    assert f"stopping after step {outcome.step}: time limit" in shown
    assert reshard.Checkpoint(tmp_path / "checkpoint").iteration == outcome.step


def test_where_nothing_is_saved_the_exit_code_is_that_of_the_signal(tmp_path: Path) -> None:
    outcome, shown = run(trainer(tmp_path, callbacks=[], resume="never"), signal_in=2)
    assert (outcome.state, outcome.saved, outcome.exit_code) == ("stopped", False, 128 + signal.SIGTERM)
    assert "which is not saved" in shown


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    outcome, _ = run(trainer(tmp_path), signal_in=STEPS)
    assert (outcome.state, outcome.step, outcome.saved, outcome.exit_code) == ("finished", STEPS, True, 0)
    assert not (tmp_path / "stopped.json").exists()


def test_a_save_that_failed_in_the_background_does_not_keep_the_last_one_from_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reshard.CheckpointManager.wait
    failing = iter([SaveError("a disk was away for a moment")])

    def wait(self: reshard.CheckpointManager) -> Any:
        report = real(self)
        if report is not None:
            for error in failing:
                raise error
        return report

    monkeypatch.setattr(reshard.CheckpointManager, "wait", wait)
    outcome, shown = run(trainer(tmp_path, monitor={"async_save": True, "save_checkpoint_steps": 5}), signal_in=None)
    assert "the save before failed; step 8 is saved all the same. a disk was away for a moment" in shown
    assert (outcome.saved, outcome.step) == (True, STEPS)
    assert reshard.Checkpoint(tmp_path / "checkpoint").iteration == STEPS


def test_what_is_no_outcome_is_none(tmp_path: Path) -> None:
    path = tmp_path / "stopped.json"
    for text in ("", "[]", '{"time": 1}', '{"state": "stopped", "step": 1, "time": 1, "more": 2}'):
        path.write_text(text)
        assert read_outcome(path) is None
    write_outcome(path, Outcome("stopped", 3, "SIGTERM", saved=True))
    assert read_outcome(path) == Outcome("stopped", 3, "SIGTERM", saved=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["stopped.json"]
