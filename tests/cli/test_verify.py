"""`reshard verify`: what it says, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from reshard.cli.app import app
from reshard.format.safetensors import read_header
from reshard.storage import PosixStorage
from tests import saving_runs as runs
from tests.golden import GOLDEN

FIRST, SECOND = "iteration_00000001", "iteration_00000002"
MODEL = "CKP-model-0000000-0000001.safetensors"
RANK = "extra/rank-0000000.safetensors"


def command(*arguments: str | Path) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with two iterations of one rank."""
    runs.save(PosixStorage(), [(1, 10), (2, 20)], root=str(tmp_path / "root"))
    return tmp_path / "root"


def spoil(path: Path, tensor: str) -> None:
    """Change the first byte of a tensor."""
    begin = read_header(PosixStorage(), str(path)).entries[tensor].begin
    with path.open("r+b") as file:
        file.seek(begin)
        byte = file.read(1)[0]
        file.seek(begin)
        file.write(bytes([byte ^ 1]))


def test_an_intact_checkpoint(root: Path) -> None:
    for path in (root, root / SECOND):
        result = command(path)
        assert result.exit_code == 0
        first, second = result.stdout.splitlines()
        assert first == str(root / SECOND)
        assert second.startswith("intact: 8 files, ")
        assert second.endswith("every byte as it was saved")
        assert result.stderr == ""


def test_a_damaged_checkpoint_names_every_file_and_tensor(root: Path) -> None:
    spoil(root / SECOND / MODEL, "embed")
    spoil(root / SECOND / MODEL, "norm")
    (root / SECOND / RANK).unlink()
    result = command(root)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[1] == "damaged: 3 faults in 2 files, 7 files looked at"
    assert lines[2] == f"  {MODEL}"
    assert lines[3].startswith("    embed: the bytes of a tensor are not as they were saved (found ")
    assert lines[4].startswith("    norm: ")
    assert lines[5:] == [f"  {RANK}", "    a file of the checkpoint is missing"]
    assert command(root / FIRST).exit_code == 0


def test_json_has_every_fault(root: Path) -> None:
    spoil(root / SECOND / MODEL, "embed")
    result = command(root, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["is_intact"], document["is_sealed"], document["iteration"]) == (False, True, 2)
    (fault,) = document["faults"]
    assert (fault["file"], fault["tensor"]) == (MODEL, "embed")
    assert json.loads(command(root / FIRST, "--json").stdout)["faults"] == []


def test_all_iterations(root: Path) -> None:
    assert command(root, "--all").exit_code == 0
    spoil(root / FIRST / MODEL, "norm")
    result = command(root, "--all")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == str(root)
    assert lines[1].startswith("iteration 1: damaged: 1 fault in 1 file, 8 files")
    assert lines[2] == f"  {MODEL}"
    assert lines[4].startswith("iteration 2: intact: 8 files")
    (root / "latest_checkpointed_iteration.txt").write_text("9")
    assert command(root, "--all").stdout.splitlines()[-1].startswith("tracker: the tracker names an iteration that isn't there")
    document = json.loads(command(root, "--all", "--json").stdout)
    assert [one["is_intact"] for one in document["iterations"]] == [False, True]
    assert document["tracker"]["file"] == "latest_checkpointed_iteration.txt"


def test_a_golden_checkpoint_says_what_was_not_checked(tmp_path: Path) -> None:
    root = shutil.copytree(GOLDEN / "dp2_tp2" / "checkpoint", tmp_path / "root")
    result = command(root)
    assert result.exit_code == 0
    assert "no fault found: 10 files; their names, sizes and headers fit" in result.stdout
    assert "note: no seal.json and no digests" in result.stdout
    path = root / FIRST / "qwen3-model-0000000-0000004.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    result = command(root)
    assert result.exit_code == 1
    assert "truncated" in result.stdout


@pytest.mark.parametrize("arguments", [("none",), ("none", "--all"), (".",), (".", "--all")])
def test_nothing_to_verify_is_the_users_mistake(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    path, *options = arguments
    result = command(tmp_path / path, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: there is no")
    assert "Traceback" not in result.output


def test_a_damaged_tracker_is_damage(root: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("")
    result = command(root)
    assert result.exit_code == 1
    assert "the tracker is empty" in result.stderr


def test_it_needs_at_least_one_reader(root: Path) -> None:
    assert command(root, "--readers", "1").exit_code == 0
    assert command(root, "--readers", "0").exit_code == 2


def test_a_terminal_sees_a_bar(root: Path, process_environment: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "reshard", "verify", str(root)],
        env={**process_environment, "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b"".join(iter(lambda: read_some(ours), b""))
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    assert b"verifying" in shown
    assert printed.startswith(str(root).encode())
    assert b"verifying" not in printed


def read_some(descriptor: int) -> bytes:
    """What a terminal was sent; nothing when its other end is closed."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def test_no_framework_is_needed(root: Path, call_reshard: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = call_reshard("verify", root, "--all")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("intact") == 2
