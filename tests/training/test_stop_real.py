"""`reshard train` is stopped while it saves, its ranks are killed: the run goes on with the losses of one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import reshard
from reshard.training.metrics import read_metrics
from reshard.training.outcome import EXIT_STOPPED, read_outcome
from tests.family import alive
from tests.processes import Failure, RankPool
from tests.training import ranks
from tests.training.test_launch import gone, group_members

Pool = Callable[[int], RankPool]

RUN: dict[str, Any] = {"data": 2, "lr_schedule": {"warmup_steps": 2, "total_steps": 1000}}
DEFERRED = [{"type": "CheckpointMonitor", "save_checkpoint_steps": 1, "keep_checkpoint_max": 2, "async_save": "deferred"}]


def losses(output: Path) -> dict[int, float]:
    return {step.step: step.loss for segment in read_metrics(output / "metrics.jsonl") for step in segment.steps}


def train_to(output: Path, steps: int, callbacks: list[dict[str, Any]], kill_at: int | None = None) -> list[float]:
    """On a rank of a pool: train on from the newest checkpoint; or die in the middle of a step."""
    fields = {"output_dir": str(output), "resume": "auto", "callbacks": callbacks}
    configuration = ranks.settings(**RUN, **fields, runner_config={"max_steps": steps})
    trainer = ranks.trainer_of(configuration)
    whole_step = trainer.step

    def step() -> Any:
        if trainer.done + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole_step()

    trainer.step = step  # type: ignore[method-assign]
    trainer.train()
    return []


def children_of(launcher: int) -> list[int]:
    """Torchrun gives its ranks sessions of their own."""
    return [int(pid) for task in Path(f"/proc/{launcher}/task").glob("*/children") for pid in task.read_text().split()]


@contextmanager
def running(folder: Path, environment: dict[str, str], command: list[str], steps: int, **fields: Any) -> Iterator[subprocess.Popen[str]]:
    """A run of two ranks that has done some steps."""
    configuration = ranks.settings(**RUN, output_dir=str(folder), resume="auto", runner_config={"max_steps": 100_000}, **fields)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(configuration.run.model_dump(exclude_none=True)))
    process = subprocess.Popen(
        [sys.executable, "-m", *command, str(path)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_bytes().count(b'"loss"') >= steps):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        yield process
    finally:
        left = children_of(process.pid)
        if group_members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.sweep
def test_stopped_while_it_saves_and_continued(tmp_path: Path, process_environment: dict[str, str], rank_pool: Pool) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with running(output, process_environment, ["reshard", "train"], 3, callbacks=DEFERRED) as process:
        # As a scheduler does it: the launcher, its fork server and the ranks, all at once; then once more.
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.05)
        process.terminate()
        shown, errors = process.communicate(timeout=60)
        assert process.returncode == EXIT_STOPPED, errors
        assert "Traceback" not in errors
        assert gone(process.pid)
    outcome = read_outcome(output / "stopped.json")
    assert outcome is not None
    assert (outcome.state, outcome.reason, outcome.saved) == ("stopped", "SIGTERM", True)
    assert f"stopping after step {outcome.step}: SIGTERM" in shown
    assert reshard.Checkpoint(output / "checkpoint").iteration == outcome.step
    assert reshard.verify(output / "checkpoint").is_intact
    more = outcome.step + 3
    rank_pool(2).run(train_to, output, more, DEFERRED)
    rank_pool(2).run(train_to, tmp_path / "straight", more, [{"type": "CheckpointMonitor", "save_checkpoint_steps": more}])
    assert not (output / "stopped.json").exists()
    assert losses(output) == losses(tmp_path / "straight")


@pytest.mark.sweep
def test_killed_while_it_saves_and_continued(tmp_path: Path, rank_pool: Pool) -> None:
    outcomes = rank_pool(2).run_settled(train_to, tmp_path / "out", 8, DEFERRED, 6)
    rank_pool(2).restart()
    assert all(isinstance(outcome, Failure) for outcome in outcomes)
    # The last that is surely committed: the save of step 4 waited for it.
    assert (reshard.Checkpoint(tmp_path / "out" / "checkpoint").iteration or 0) >= 3
    rank_pool(2).run(train_to, tmp_path / "out", 8, DEFERRED)
    rank_pool(2).run(train_to, tmp_path / "straight", 8, [{"type": "CheckpointMonitor", "save_checkpoint_steps": 2}])
    again = read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]
    assert again.start["resumed_from"] >= 3
    assert losses(tmp_path / "out") == losses(tmp_path / "straight")


@pytest.mark.sweep
def test_a_time_limit_of_a_whole_job(tmp_path: Path, process_environment: dict[str, str]) -> None:
    with running(tmp_path, process_environment, ["reshard", "train"], 1, callbacks=DEFERRED, stop_after_minutes=0.05) as process:
        shown, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, errors
    assert "time limit" in shown
    outcome = read_outcome(tmp_path / "stopped.json")
    assert outcome is not None
    assert (outcome.reason, outcome.saved) == ("time limit", True)
    assert reshard.Checkpoint(tmp_path / "checkpoint").iteration == outcome.step


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reshard", "train"]


@pytest.mark.sweep
def test_under_torchrun_ranks_end_with_0_and_leave_a_file(tmp_path: Path, process_environment: dict[str, str]) -> None:
    with running(tmp_path, process_environment, TORCHRUN, 3, callbacks=DEFERRED) as process:
        # Of one rank only: torchrun hears of nothing but that its ranks ended well.
        os.kill(children_of(process.pid)[1], signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    outcome = read_outcome(tmp_path / "stopped.json")
    assert outcome is not None
    assert (outcome.reason, outcome.saved) == ("SIGTERM", True)
    assert reshard.Checkpoint(tmp_path / "checkpoint").iteration == outcome.step


@pytest.mark.sweep
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_under_torchrun_the_others_end_before_they_are_killed(tmp_path: Path, process_environment: dict[str, str], how: int) -> None:
    with running(tmp_path, process_environment, TORCHRUN, 3, callbacks=DEFERRED) as process:
        first, second = children_of(process.pid)
        os.kill(second, how)
        if how == signal.SIGSTOP:
            # It is there, and never comes: rank 0 is in the middle of a collective with it.
            time.sleep(0.5)
            os.kill(first, signal.SIGTERM)
        began = time.monotonic()
        while alive([first]):
            assert time.monotonic() - began < 28, "torchrun would have to kill it"
            time.sleep(0.05)
    assert not (tmp_path / "stopped.json").exists() or not read_outcome(tmp_path / "stopped.json").saved  # type: ignore[union-attr]
    assert reshard.verify(tmp_path / "checkpoint").is_intact
