"""Real ranks under msrun, in one launch per world size: the communicator, and saves and loads under every strategy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.family import end, family_of

RANKS = Path(__file__).with_name("ranks.py")


def msrun(count: int, program: Path, *arguments: str | Path, environment: dict[str, str], cwd: Path, timeout: float) -> str:
    """Run a program on so many ranks; what the launcher printed. Its processes end with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scripts = str(Path(sys.executable).parent)
    command = [f"{scripts}/msrun", f"--worker_num={count}", f"--local_worker_num={count}", f"--master_port={port}"]
    command += [f"--log_dir={cwd}/log", "--join=True", str(program), *map(str, arguments)]
    # msrun calls whatever `python` the path has.
    environment = {**environment, "PATH": f"{scripts}:{os.environ['PATH']}", "GLOG_v": "3"}
    process = subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        if process.poll() is None:
            end(family_of(process.pid))
            process.wait()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.sweep), 4, pytest.param(8, marks=pytest.mark.sweep)])
def test_ranks_under_msrun(count: int, tmp_path: Path, process_environment: dict[str, str], repository: Path) -> None:
    environment = {**process_environment, "PYTHONPATH": f"{repository / 'src'}:{repository}"}
    printed = msrun(count, RANKS, tmp_path, environment=environment, cwd=tmp_path, timeout=550)
    files = sorted(tmp_path.glob("rank-*.json"))
    assert len(files) == count, printed
    for file in files:
        for case, result in json.loads(file.read_text(encoding="utf-8")).items():
            assert isinstance(result, float), f"{file.stem}, {case}:\n{result}"
