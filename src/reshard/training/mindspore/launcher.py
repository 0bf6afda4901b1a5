"""Starts the ranks of a run on this machine through msrun, and ends as they do. Imports no framework."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from reshard.config.validation import Configuration
from reshard.errors import CommunicationError
from reshard.training.failures import RankFailedError, error_of_rank
from reshard.training.mindspore.job import Job
from reshard.training.outcome import read_outcome

# Ranks that a signal stops have this long (seconds) to save, as under torch's launcher.
_GRACE = 30.0

# Msrun looks at its processes once a second; when all ranks are gone, it and its scheduler may still wait for this long (seconds).
_AFTER_THE_RANKS = 10.0

_PAUSE = 0.05

_LOG_LEVEL = "GLOG_v"

# What msrun says of the first rank that ended with another code than 0.
_ENDED_BY_SIGNAL = re.compile(r"Worker process (\d+) exit with exception\. Error code: -(\d+)")


def launch_under_msrun(configuration: Configuration, ranks: int) -> None:
    """Train on ranks of this machine.

    What rank 0 prints is shown. A SIGTERM is passed on to the ranks, which then save and end.

    Raises:
        ReshardError: as the first rank that failed.
        RankFailedError: a rank failed with something else.
        SystemExit: the run was stopped before its last step; with the code of `Outcome.exit_code`.
    """
    with tempfile.TemporaryDirectory(prefix="reshard-launch-") as directory:
        job = Job(Path(directory))
        job.write_configuration(configuration)
        with _signals() as signals:
            _run_to_the_end(job, ranks, signals)
        outcome = read_outcome(job.outcome_file)
        if outcome is not None:
            code = outcome.exit_code
        elif all(job.has_ended(rank) for rank in range(ranks)):
            code = 0
        elif signals:
            # As a shell says it of a process that a signal ended.
            code = 128 + signals[0]
        else:
            raise _failure(job, ranks)
    if code:
        raise SystemExit(code)


def _run_to_the_end(job: Job, ranks: int, signals: list[int]) -> None:
    log = job.directory / "msrun.log"
    with open(log, "wb") as output:
        msrun = subprocess.Popen(  # noqa: S603 - our own command, no shell
            _command(job, ranks),
            env=_environment(ranks),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A signal to this process's group is for this process alone to pass on: msrun would kill the ranks.
            start_new_session=True,
        )
    try:
        with _follower(job.log(0)) as show:
            _wait(msrun, job, ranks, signals, show)
    finally:
        _end(msrun, job, ranks)


def _wait(msrun: subprocess.Popen[bytes], job: Job, ranks: int, signals: list[int], show: Callable[[], None]) -> None:
    """Until all is over, or nothing more is to be expected."""
    told: set[int] = set()
    latest: float | None = None
    while msrun.poll() is None:
        show()
        processes = {rank: job.process_of(rank) for rank in range(ranks)}
        if signals:
            for rank, process in processes.items():
                if process is not None and rank not in told:
                    told.add(rank)
                    with suppress(ProcessLookupError):
                        os.kill(process, signals[0])
        wait = None
        if all(job.has_begun(rank) for rank in range(ranks)) and not any(processes.values()):
            wait = _AFTER_THE_RANKS
        elif signals:
            wait = _GRACE
        if wait is not None:
            latest = min(latest or float("inf"), time.monotonic() + wait)
            if time.monotonic() > latest:
                return
        time.sleep(_PAUSE)


def _end(msrun: subprocess.Popen[bytes], job: Job, ranks: int) -> None:
    """Nothing that was started outlives its launcher."""
    groups = [process for process in map(job.process_of, range(ranks)) if process is not None]
    for group in (msrun.pid, *groups):
        # Msrun gives every rank a session of its own; its scheduler is in its own one.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    msrun.wait()


def _command(job: Job, ranks: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    msrun = [sys.executable, "-m", "mindspore.parallel.cluster.run", f"--worker_num={ranks}", f"--local_worker_num={ranks}"]
    msrun += ["--master_addr=127.0.0.1", f"--master_port={port}", f"--log_dir={job.directory}", "--join=True"]
    # Of no rank: what it shows ends in the middle of a line. We follow the log ourselves.
    msrun += [f"--tail_worker_log={ranks}"]
    return [*msrun, "python3", "-m", "reshard.training.mindspore.worker", str(job.directory), str(os.getpid())]


def _environment(ranks: int) -> dict[str, str]:
    # Msrun starts whatever `python3` the path leads to.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # MindSpore logs to where ranks print: errors only, unless the user knows better.
    log_level = os.environ.get(_LOG_LEVEL, "3")
    return {**os.environ, "PATH": path, _LOG_LEVEL: log_level, "PYTHONUNBUFFERED": "1", "LOCAL_WORLD_SIZE": str(ranks)}


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that say that the run is to stop, as they come."""
    got: list[int] = []

    def take(number: int, _: FrameType | None) -> None:
        got.append(number)

    before = signal.signal(signal.SIGTERM, take)
    try:
        yield got
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _follower(path: Path) -> Iterator[Callable[[], None]]:
    """A function that shows what was added to a file; at the end, what is left."""
    opened: list[Any] = []

    def show() -> None:
        if not opened:
            with suppress(FileNotFoundError):
                opened.append(open(path, encoding="utf-8", errors="replace"))  # noqa: SIM115 - closed below
        text = opened[0].read() if opened else ""
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        yield show
        show()
    finally:
        for file in opened:
            file.close()


def _failure(job: Job, ranks: int) -> Exception:
    """The error of the rank that failed first. One that lost another rank comes last: the other one has the reason."""
    said = (job.directory / "msrun.log").read_text(encoding="utf-8", errors="replace")
    ended = _ENDED_BY_SIGNAL.search(said)
    if ended is not None:
        number = signal.Signals(int(ended[2]))
        return RankFailedError(f"rank {job.rank_of(int(ended[1]), ranks)} died: Signal {number.value} ({number.name})")
    errors = sorted(job.errors(), key=lambda error: error.kind == CommunicationError.__name__)
    if errors:
        return error_of_rank(errors[0].kind, errors[0].message, errors[0].rank)
    return RankFailedError(f"the ranks have ended without a word; msrun said:\n{said}")
