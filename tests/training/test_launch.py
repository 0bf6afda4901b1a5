"""`reshard train` as a user runs it: real processes, real signals, exit codes, what is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from reshard.errors import CheckpointNotFoundError, ConfigError
from reshard.training import launcher, worker
from reshard.training.metrics import read_metrics
from tests.training import ranks

Command = Callable[..., subprocess.CompletedProcess[str]]


def written(folder: Path, **fields: Any) -> Path:
    """A configuration for two data-parallel ranks, in a file."""
    run: dict[str, Any] = {
        "use_legacy_format": False,
        "output_dir": str(folder / "out"),
        "resume": "auto",
        "model": ranks.MODEL,
        "train_dataset": {"seq_length": 16},
        "runner_config": {"max_steps": 2, "batch_size": 1, "global_batch_size": 4},
        "parallel_config": {"data_parallel": 2},
        "parallel": {"enable_parallel_optimizer": True},
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 1}],
    }
    for name, value in fields.items():
        run[name] = {**run[name], **value} if isinstance(value, dict) and name in run else value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def test_a_wrong_field_ends_before_anything_starts(tmp_path: Path, run_reshard: Command) -> None:
    path = written(tmp_path, optimiser={"type": "AdamW"})
    done = run_reshard("train", path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: optimiser is not a field of the configuration; did you mean optimizer?\n")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        (["--nproc", "3"], "parallel_config", "data_parallel 2 × model_parallel 1 × pipeline_stage 1, 3 ranks"),
        (["--set", "parallel_config.pipeline_stage=5"], "parallel_config.pipeline_stage", "at most model.num_hidden_layers, 4"),
        (["--set", "runner_config.global_batch_size=3"], "runner_config.global_batch_size", "a multiple of 2"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Path, run_reshard: Command, options: list[str], field: str, words: str) -> None:
    done = run_reshard("train", written(tmp_path), *options)
    assert done.returncode == 2
    assert f"field:    {field}\n" in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_under_torchrun_it_is_one_rank_and_by_itself_it_starts_them(
    tmp_path: Path, run_reshard: Command, process_environment: dict[str, str]
) -> None:
    path = written(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reshard", "train", str(path)]
    done = subprocess.run(torchrun, env=process_environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "on 2 ranks (dp2)" in done.stdout

    done = run_reshard("train", path, "--set", "runner_config.max_steps=3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[1].startswith("resume: auto: continuing from iteration 2")
    assert lines[2].startswith("step 3/3  loss ")
    assert len(lines) == 4
    segments = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [segment.start["resumed_from"] for segment in segments] == [None, 2]
    assert [[step.step for step in segment.steps] for segment in segments] == [[1, 2], [3]]


def test_a_ranks_error_is_said_once_without_its_stack(tmp_path: Path, run_reshard: Command) -> None:
    path = written(tmp_path, resume="never", load_checkpoint=str(tmp_path / "none"))
    done = run_reshard("train", path)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert str(tmp_path / "none") in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint/iteration_*"))


def group_members(group: int) -> dict[int, int]:
    """The running processes of a group, with their parents."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent, of = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(of) == group and state not in "ZX":
                found[int(entry.name)] = int(parent)
    return found


@contextmanager
def endless(folder: Path, environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run of two ranks in the middle of its steps: the launcher, and the ranks' processes."""
    path = written(folder, runner_config={"max_steps": 100_000}, callbacks=[], resume="never")
    command = [sys.executable, "-m", "reshard", "train", str(path)]
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        metrics = folder / "out" / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 2):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        # The ranks are the fork server's children, the launcher's grandchildren.
        members = group_members(process.pid)
        yield process, [pid for pid, parent in members.items() if members.get(parent) == process.pid]
    finally:
        if group_members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def gone(group: int, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while group_members(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_rank_that_is_killed_ends_the_run(tmp_path: Path, process_environment: dict[str, str]) -> None:
    with endless(tmp_path, process_environment) as (process, workers):
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "died: Signal 9 (SIGKILL)" in errors
        assert gone(process.pid)


@pytest.mark.sweep
def test_no_rank_outlives_its_launcher(tmp_path: Path, process_environment: dict[str, str]) -> None:
    with endless(tmp_path, process_environment) as (process, _):
        process.kill()
        assert gone(process.pid)


def test_a_scheduler_can_stop_it(tmp_path: Path, process_environment: dict[str, str]) -> None:
    with endless(tmp_path, process_environment) as (process, _):
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in errors
        assert gone(process.pid)


def failing(error: BaseException) -> Callable[[object], None]:
    def run_rank(_: object) -> None:
        raise error

    return run_rank


def failure_of(monkeypatch: pytest.MonkeyPatch, file: Path, error: BaseException) -> tuple[int, Exception]:
    """What a worker that raises leaves, and what the launcher makes of it."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(worker, "run_rank", failing(error))
    monkeypatch.setattr(worker, "_AFTER_YOU", 0.0)
    with pytest.raises(SystemExit) as ended:
        worker.launched(ranks.settings(), str(file.with_name("outcome.json")))
    message = json.loads(file.read_text())["message"]
    failed = SimpleNamespace(get_first_failure=lambda: (1, SimpleNamespace(local_rank=1, message=message, exitcode=ended.value.code)))
    assert isinstance(ended.value.code, int)
    return ended.value.code, launcher._error_of(failed)


def test_an_error_of_ours_comes_through_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = CheckpointNotFoundError("there is no checkpoint", file="somewhere", fix="look again")
    code, found = failure_of(monkeypatch, tmp_path / "error.json", error)
    assert code == 2
    assert type(found) is CheckpointNotFoundError
    assert str(found) == str(error)


def test_an_unforeseen_error_comes_through_with_its_stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, found = failure_of(monkeypatch, tmp_path / "error.json", ZeroDivisionError("oh"))
    assert code == 1
    assert type(found) is launcher.RankFailedError
    assert str(found).startswith("rank 1 failed:\nTraceback")
    assert "ZeroDivisionError: oh" in str(found)


def test_ranks_can_not_be_started_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as caught:
        launcher.launch(ranks.settings(data=2), nproc=4)
    assert caught.value.field == "--nproc"
