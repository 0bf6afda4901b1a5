"""Starts `reshard train`, follows it, and kills it at a chosen moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from reshard.training.metrics import METRICS_FILE, read_metrics

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
CONFIG = HERE / "qwen3.yaml"

# A directory of this name is a checkpoint that is being written.
SAVING = ".saving-iteration_*"


@dataclass
class Run:
    """One output folder and all that was started on it.

    Attributes:
        name: what the table calls it.
        folder: metrics, checkpoints and the log.
        fields: what it changes of the configuration.
        kills: for each kill the last step that was done, and whether a save was under way.
        config: the configuration.
    """

    name: str
    folder: Path
    fields: dict[str, object] = field(default_factory=dict)
    kills: list[dict[str, object]] = field(default_factory=list)
    config: Path = CONFIG

    @property
    def root(self) -> Path:
        """The checkpoint root."""
        return self.folder / "checkpoint"

    def last_step(self) -> int:
        """The last step in the metrics file."""
        file = self.folder / METRICS_FILE
        steps = [metrics.step for segment in read_metrics(file) for metrics in segment.steps[-1:]] if file.exists() else []
        return steps[-1] if steps else 0


class StartedRun:
    """The processes of a run: a session of its own, so that one signal reaches all of them."""

    def __init__(self, run: Run) -> None:
        overrides = {"output_dir": run.folder, **run.fields}
        command = [sys.executable, "-m", "reshard", "train", str(run.config)]
        for name, value in overrides.items():
            command += ["--set", f"{name}={value}"]
        run.folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(part for part in (str(REPOSITORY / "src"), os.environ.get("PYTHONPATH")) if part)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._log = open(run.folder / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 - closed by the reading thread
        self._reader = threading.Thread(target=self._show, daemon=True)
        self._reader.start()

    def _show(self) -> None:
        assert self.process.stdout is not None
        with self._log as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                print(f"    {line}", end="", flush=True)

    def wait(self) -> int:
        """The exit code, when it has ended."""
        code = self.process.wait()
        self._reader.join()
        return code

    def kill(self) -> None:
        """SIGKILL to the launcher and every rank, and wait until none is left."""
        # Msrun gives each of its ranks a session of its own.
        members = family_of(self.process.pid)
        for member in members:
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        self.wait()
        deadline = time.monotonic() + 30
        while members & running().keys():
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes of {self.process.pid} outlive SIGKILL")
            time.sleep(0.01)


def running() -> dict[int, tuple[int, int]]:
    """The running processes, each with its parent and its group."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if state not in "ZX":
            found[int(entry.name)] = int(parent), int(group)
    return found


def family_of(leader: int) -> set[int]:
    """The running processes of a group, and what descends from them."""
    everyone = running()
    members = {process for process, (_, group) in everyone.items() if group == leader}
    while True:
        children = {process for process, (parent, _) in everyone.items() if parent in members} - members
        if not children:
            return members
        members |= children


def fresh(run: Run) -> Run:
    """An empty folder: what was left there earlier is removed."""
    shutil.rmtree(run.folder, ignore_errors=True)
    return run


def continued(killed: Run, run: Run) -> Run:
    """A run that goes on from a copy of what the killed one left, so that several can."""
    fresh(run)
    run.folder.mkdir(parents=True)
    shutil.copytree(killed.root, run.root)
    return run


def finish(run: Run) -> None:
    """Start a run and let it come to its end."""
    started = StartedRun(run)
    code = started.wait()
    if code != 0:
        raise SystemExit(f"{run.name} ended with exit code {code}; its output is in {run.folder / 'log.txt'}")


def kill_at_random_moment(run: Run, choice: random.Random, steps: range) -> None:
    """Start a run and kill it in the middle of whatever it does after a step that `choice` draws."""
    step, fraction = choice.choice(steps), choice.random()
    print(f"    to be killed {fraction:.0%} of a step after step {step}")
    with _started(run) as started:
        file = run.folder / METRICS_FILE
        _wait_for(started, lambda: run.last_step() >= step, pause=0.02)
        time.sleep(fraction * read_metrics(file)[-1].steps[-1].seconds)
        started.kill()
    run.kills.append({"step": run.last_step(), "saving": bool(list(run.root.glob(SAVING)))})
    print(f"    killed all ranks after step {run.last_step()}")


def kill_while_saving(run: Run, earliest: int) -> None:
    """Start a run and kill it as soon as it has begun to write a checkpoint after a step; a commit that was faster is tried again."""
    for _ in range(4):
        _kill_at_next_save(run, earliest)
        unfinished = sorted(path.name for path in run.root.glob(SAVING))
        if unfinished:
            run.kills.append({"step": run.last_step(), "saving": True})
            print(f"    killed all ranks while they saved step {run.last_step()}; left behind: {unfinished[0]}")
            return
        run.kills.append({"step": run.last_step(), "saving": False})
        print("    that checkpoint was committed before the kill; once more")
        earliest = run.last_step()
    raise SystemExit("no kill fell into a save")


def _kill_at_next_save(run: Run, earliest: int) -> None:
    with _started(run) as started:
        # A save of this size takes some hundredths of a second: look often, and cheaply.
        _wait_for(started, lambda: any(run.root.glob(SAVING)) and run.last_step() > earliest, pause=0.002)
        started.kill()


@contextmanager
def _started(run: Run) -> Iterator[StartedRun]:
    started = StartedRun(run)
    try:
        yield started
    except BaseException:
        started.kill()
        raise


def _wait_for(started: StartedRun, condition: Callable[[], bool], pause: float) -> None:
    while not condition():
        if started.process.poll() is not None:
            raise SystemExit(f"the run ended by itself, with exit code {started.process.returncode}, before it could be killed")
        time.sleep(pause)
