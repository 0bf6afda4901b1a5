"""`reshard train` under MindSpore as a user runs it: ranks under msrun, real signals, exit codes, what is printed."""

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
from tests.family import end, family_of, gone
from tests.frameworks.mindspore.test_real_ranks import msrun
from tests.training import ranks
from tests.training.test_mindspore import LIMIT, SMALL, close, losses, run

Command = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.timeout(600)  # five processes import MindSpore


def written(folder: Path, **fields: Any) -> Path:
    """The run of the tests on one card, for two ranks, in a file."""
    given: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "resume": "auto",
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 2}],
        "lr_schedule": {"type": "CosineWithWarmUpLR", "warmup_steps": 2, "total_steps": 8},
        "optimizer": {"learning_rate": 1e-2},
        "runner_config": {"max_steps": 8, "batch_size": 4},
        "model": SMALL,
    }
    configuration = ranks.settings(data=2, shard=None, framework="mindspore", **{**given, **fields})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(configuration.run.model_dump(exclude_none=True)))
    return path


def test_two_ranks_train_one_goes_on(tmp_path: Path, run_reshard: Command) -> None:
    path = written(tmp_path)
    done = run_reshard("train", path, "--set", "runner_config.max_steps=4", timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert "on 2 ranks (dp2)" in lines[0]
    assert lines[-1].startswith("saved step 4")
    run(tmp_path / "out", "mindspore", steps=6)
    first, second = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert (first.start["ranks"], second.start["ranks"], second.start["resumed_from"]) == (2, 1, 4)
    run(tmp_path / "straight", "mindspore", steps=6)
    assert close(losses(tmp_path / "out"), losses(tmp_path / "straight"), limit=LIMIT)


def role_of(pid: int) -> tuple[str, str] | None:
    """What msrun has made a process: its role and its rank."""
    with suppress(OSError):
        pairs = dict(part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in part)
        if "reshard.training.mindspore.worker" in Path(f"/proc/{pid}/cmdline").read_text() and "MS_ROLE" in pairs:
            return pairs["MS_ROLE"], pairs["RANK_ID"]
    return None


@contextmanager
def running(folder: Path, environment: dict[str, str], steps: int, **fields: Any) -> Iterator[tuple[subprocess.Popen[str], dict[str, int]]]:
    """A run of two ranks that has done some steps: the launcher, and the processes of its ranks."""
    path = written(folder, **{"runner_config": {"max_steps": 100_000, "batch_size": 4}, **fields})
    process = subprocess.Popen(
        [sys.executable, "-m", "reshard", "train", str(path)],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    members = {process.pid}
    try:
        metrics = folder / "out" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_bytes().count(b'"loss"') >= steps):
            members |= family_of(process.pid)
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        members |= family_of(process.pid)
        roles = {pid: role_of(pid) for pid in members}
        yield process, {role[1]: pid for pid, role in roles.items() if role is not None and role[0] == "MS_WORKER"}
    finally:
        end(members | family_of(process.pid))
        process.communicate()


LONG = {"lr_schedule": {"type": "ConstantWarmUpLR", "warmup_steps": 2}}


@pytest.mark.sweep
def test_stopped_by_a_scheduler_and_continued(tmp_path: Path, process_environment: dict[str, str], run_reshard: Command) -> None:
    callbacks = [{"type": "CheckpointMonitor", "save_checkpoint_steps": 3, "async_save": True, "remove_redundancy": True}]
    with running(tmp_path, process_environment, 4, callbacks=callbacks, **LONG) as (process, workers):
        everyone = family_of(process.pid)
        assert len(everyone) > len(workers) == 2
        os.killpg(process.pid, signal.SIGTERM)
        shown, errors = process.communicate(timeout=120)
        assert process.returncode == EXIT_STOPPED, errors
        assert "Traceback" not in errors
        assert gone(everyone)
    outcome = read_outcome(tmp_path / "out" / "stopped.json")
    assert outcome is not None
    assert (outcome.state, outcome.reason, outcome.saved) == ("stopped", "SIGTERM", True)
    assert f"stopping after step {outcome.step}: SIGTERM" in shown
    assert reshard.Checkpoint(tmp_path / "out" / "checkpoint").iteration == outcome.step
    last = outcome.step + 3
    done = run_reshard("train", tmp_path / "run.yaml", "--set", f"runner_config.max_steps={last}", timeout=500)
    assert done.returncode == 0, done.stderr
    assert f"continuing from iteration {outcome.step}" in done.stdout
    straight = run_reshard("train", written(tmp_path / "out", **LONG), "--set", f"runner_config.max_steps={last}", timeout=500)
    assert straight.returncode == 0, straight.stderr
    assert losses(tmp_path / "out") == losses(tmp_path / "out" / "out")


@pytest.mark.sweep
def test_killed_and_continued_with_the_same_losses(tmp_path: Path, process_environment: dict[str, str], run_reshard: Command) -> None:
    with running(tmp_path, process_environment, 5, **LONG) as (process, workers):
        everyone = family_of(process.pid)
        for pid in workers.values():
            os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "died: Signal 9 (SIGKILL)" in errors
        assert gone(everyone)
    saved = reshard.Checkpoint(tmp_path / "out" / "checkpoint").iteration or 0
    assert saved >= 4
    last = saved + 4
    done = run_reshard("train", tmp_path / "run.yaml", "--set", f"runner_config.max_steps={last}", timeout=500)
    assert done.returncode == 0, done.stderr
    straight = run_reshard("train", written(tmp_path / "out", **LONG), "--set", f"runner_config.max_steps={last}", timeout=500)
    assert straight.returncode == 0, straight.stderr
    killed, resumed = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert resumed.start["resumed_from"] == saved
    expected = losses(tmp_path / "out" / "out")
    assert {step.step: step.loss for step in resumed.steps} == {step: expected[step] for step in range(saved + 1, last + 1)}
    assert all(step.loss == expected[step.step] for step in killed.steps if step.step <= last)


@pytest.mark.sweep
def test_a_rank_that_is_killed_ends_the_run(tmp_path: Path, process_environment: dict[str, str]) -> None:
    with running(tmp_path, process_environment, 2, **LONG) as (process, workers):
        everyone = family_of(process.pid)
        os.kill(workers["1"], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "rank 1 died: Signal 9 (SIGKILL)" in errors
        assert gone(everyone)


@pytest.mark.sweep
def test_no_rank_outlives_its_launcher(tmp_path: Path, process_environment: dict[str, str]) -> None:
    with running(tmp_path, process_environment, 2, **LONG) as (process, _):
        everyone = family_of(process.pid)
        process.kill()
        assert gone(everyone)


@pytest.mark.sweep
def test_a_ranks_error_is_said_once_without_its_stack(tmp_path: Path, run_reshard: Command) -> None:
    path = written(tmp_path, resume="never", load_checkpoint=str(tmp_path / "none"))
    done = run_reshard("train", path, timeout=500)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert str(tmp_path / "none") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.sweep
def test_under_a_users_own_msrun(tmp_path: Path, process_environment: dict[str, str]) -> None:
    path = written(tmp_path)
    program = tmp_path / "reshard_train.py"
    program.write_text("import sys\nfrom reshard.cli.app import main\nmain()\n")
    printed = msrun(2, program, "train", path, environment=process_environment, cwd=tmp_path, timeout=500)
    (segment,) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [step.step for step in segment.steps] == list(range(1, 9)), printed
    assert reshard.Checkpoint(tmp_path / "out" / "checkpoint").iteration == 8
    assert "on 2 ranks (dp2)" in printed
