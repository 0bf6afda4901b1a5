"""The command under torchrun: its ranks share the files of an export out between them, and make the folder that one process makes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import reshard
from tests.export.test_export import contents, save


@pytest.mark.sweep
@pytest.mark.timeout(600)
def test_ranks_of_torchrun_make_the_same_folder(tmp_path: Path, process_environment: dict[str, str]) -> None:
    root = save(tmp_path / "root", 2, 2)
    reshard.export_checkpoint(root, tmp_path / "alone", max_shard_size="1KB")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "reshard"]
    command = [*launcher, "export", str(root), str(tmp_path / "folder"), "--max-shard-size", "1KB"]
    process = subprocess.Popen(
        command, env=process_environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, errors = process.communicate(timeout=550)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, errors
    assert printed.count(str(tmp_path / "folder")) == 1, "rank 0 alone says what was done"
    assert contents(tmp_path / "folder") == contents(tmp_path / "alone")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 3
