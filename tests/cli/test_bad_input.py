"""Bad input at the command line: a message, exit code 2, no traceback, nothing written and nothing lost."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from reshard.checkpoint import Checkpoint
from reshard.cli.app import app
from reshard.manager import CheckpointManager
from reshard.training.metrics import read_metrics
from tests.golden import GOLDEN
from tests.seals import seal_again
from tests.training.ranks import MODEL

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = "iteration_00000001"


def command(*arguments: str | Path) -> Result:
    """The command, in this process: its ranks are this process too."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def written(folder: Path, **fields: Any) -> Path:
    """A configuration for one rank, in a file; its output goes beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    run: dict[str, Any] = {
        "use_legacy_format": False,
        "output_dir": str(folder / "out"),
        "model": MODEL,
        "train_dataset": {"seq_length": 16, "path": str(folder / "text")},
        "runner_config": {"max_steps": 2, "batch_size": 1, "global_batch_size": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run | fields))
    return path


def monitor(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "CheckpointMonitor", "save_checkpoint_steps": 1, **fields}]


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that lies in a folder, but for the lock file, which is nobody's data."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
        if path.name != ".reshard.lock"
    }


def check_refused(result: Result, *words: str) -> None:
    """It ended in an error that says this, and in nothing else."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), "an exception that nobody caught is a traceback for a user"
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run of one step, which saved its optimizer."""
    folder = tmp_path_factory.mktemp("trained")
    result = command("train", written(folder, callbacks=monitor()), "--set", "runner_config.max_steps=1")
    assert result.exit_code == 0, result.output
    return folder / "out" / "checkpoint"


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy of that root."""
    return shutil.copytree(trained, tmp_path / "root")


def empty_tracker(root: Path) -> None:
    (root / TRACKER).write_text("")


def wordy_tracker(root: Path) -> None:
    (root / TRACKER).write_text("the newest")


def early_tracker(root: Path) -> None:
    (root / TRACKER).write_text("7")


def several_ranks_without_metadata(root: Path) -> None:
    shutil.rmtree(root)
    shutil.copytree(GOLDEN / "dp2_tp2" / "checkpoint", root)
    (root / ITERATION / "metadata.json").unlink()


def garbled_metadata(root: Path) -> None:
    path = root / ITERATION / "metadata.json"
    path.write_bytes(path.read_bytes()[:-5])
    seal_again(root / ITERATION)


def promising_metadata(root: Path) -> None:
    """It promises a tensor that the file doesn't hold."""
    (path,) = (root / ITERATION).glob("*-model-*")
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    seal_again(root / ITERATION)


def other_metadata(root: Path) -> None:
    path = root / ITERATION / "metadata.json"
    path.write_bytes(path.read_bytes().replace(b'"Float32"', b'"Float16"'))


def missing_seal(root: Path) -> None:
    (root / ITERATION / "seal.json").unlink()


def truncated_file(root: Path) -> None:
    (path,) = (root / ITERATION).glob("*-model-*")
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["there is no such checkpoint", "/root"]),
        (empty_tracker, ["the tracker is empty", TRACKER]),
        (wordy_tracker, ["the tracker holds no iteration number", TRACKER, "the newest"]),
        (early_tracker, ["names an iteration that isn't there", TRACKER, "one of 1"]),
        (several_ranks_without_metadata, ["metadata.json is missing from a checkpoint of several ranks", "4 ranks"]),
        (garbled_metadata, ["not JSON", "metadata.json"]),
        (other_metadata, ["not as it was saved", "metadata.json"]),
        (missing_seal, ["a file of the checkpoint is missing", "seal.json"]),
        (promising_metadata, ["promises a tensor that the file doesn't hold", "model.norm.weight"]),
        (truncated_file, ["truncated", "-model-0000000-0000001.safetensors"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_checkpoint_that_is_not_what_it_should_be(damage: Callable[[Path], object], words: list[str], root: Path, tmp_path: Path) -> None:
    damage(root)
    before = contents(root) if root.exists() else {}
    check_refused(command("show", root), *words)
    run = written(tmp_path / "run", load_checkpoint=str(root), resume_training=True, callbacks=monitor())
    check_refused(command("train", run), *words)
    assert (contents(root) if root.exists() else {}) == before
    assert contents(tmp_path / "run" / "out") == {"checkpoint": None}, "nothing was trained or saved"


def test_a_model_of_other_shapes(root: Path, tmp_path: Path) -> None:
    wider = MODEL | {"hidden_size": 64}
    run = written(tmp_path / "run", load_checkpoint=str(root), resume_training=True, model=wider)
    before = contents(root)
    check_refused(command("train", run), "have another shape in the checkpoint", "model.embed_tokens.weight", "32]", "64]")
    assert contents(root) == before


def test_a_checkpoint_without_optimizer_says_what_allows_it(tmp_path: Path) -> None:
    saved = written(tmp_path / "saved", callbacks=monitor(save_optimizer=False), runner_config={"max_steps": 1, "global_batch_size": 1})
    assert command("train", saved).exit_code == 0
    root = tmp_path / "saved" / "out" / "checkpoint"
    run = written(tmp_path / "run", load_checkpoint=str(root), resume_training=True)
    before = contents(root)
    check_refused(command("train", run), "the checkpoint has no optimizer state", "no_load_optim: True")
    assert contents(root) == before
    allowed = command("train", run, "--set", "no_load_optim=True")
    assert allowed.exit_code == 0, allowed.output
    assert [step.step for step in read_metrics(tmp_path / "run" / "out" / "metrics.jsonl")[0].steps] == [2]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("runner_config.max_steps=many", ["runner_config.max_steps", "a whole number", "many"]),
        ("callbacks=5", ["callbacks", "a list"]),
        ("resume_trainig=True", ["resume_trainig", "did you mean resume_training?"]),
        ("parallel_config.data_parallel=3", ["parallel_config", "3"]),
        ("checkpoint.save_max=0", ["checkpoint.save_max", "at least 1"]),
    ],
)
def test_a_configuration_that_can_not_be(override: str, words: list[str], tmp_path: Path) -> None:
    run = written(tmp_path / "run", callbacks=monitor())
    options = ("--nproc", "2") if "parallel" in override else ()
    check_refused(command("train", run, *options, "--set", override), *words)
    assert not (tmp_path / "run" / "out").exists()


@pytest.mark.parametrize("text", ["", "# nothing but a note\n", "- seed: 1\n", "seed\n"])
def test_a_configuration_without_a_field(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    check_refused(command("train", path), "the configuration is", str(path))


def test_a_second_run_on_the_same_root(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.training.trainer.CheckpointManager", functools.partial(CheckpointManager, lock_timeout=0.1))
    run = written(tmp_path / "run", resume="auto", callbacks=monitor(directory=str(root)))
    before = contents(root)
    with CheckpointManager(root):
        check_refused(command("train", run), "another run writes this checkpoint root", str(root), f"process {os.getpid()}")
    assert contents(root) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full(small_disk: Path, trained: Path, tmp_path: Path) -> None:
    root = shutil.copytree(trained, small_disk / "root")
    before = contents(root)
    left = shutil.disk_usage(small_disk).free
    (small_disk / "others").write_bytes(bytes(left - 100_000))
    run = written(tmp_path / "run", resume="auto", callbacks=monitor(directory=str(root)))
    check_refused(command("train", run), "iteration_00000002 was not saved", "free some space")
    assert contents(root) == before
    assert Checkpoint(root).iteration == 1


def by_mode(root: Path, disk: Path) -> None:
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def by_mount(root: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(OSError, match="Read-only"):
        (root / "x").touch()


@pytest.mark.parametrize("protect", [by_mode, by_mount])
def test_a_directory_that_can_only_be_read_loads(
    protect: Callable[[Path, Path], None], trained: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # The superuser may write whatever the modes say: only a mount stops him.
    disk = request.getfixturevalue("small_disk") if protect is by_mount else tmp_path
    root = shutil.copytree(trained, disk / "root")
    before = contents(root)
    protect(root, disk)
    assert command("ls", root).exit_code == 0
    assert command("show", root).exit_code == 0
    result = command("train", written(tmp_path / "run", load_checkpoint=str(root), resume_training=True, callbacks=monitor()))
    assert result.exit_code == 0, result.output
    assert "continuing from iteration 1" in result.output
    assert Checkpoint(tmp_path / "run" / "out" / "checkpoint").iteration == 2
    assert contents(root) == before
