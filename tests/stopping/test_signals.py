"""Signals reach the run wherever its main thread is; children of the process have none of it; who is stuck is ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator, SingleProcess
from reshard.stopping.signals import SignalPipe
from reshard.storage import PosixStorage
from reshard.storage.storage import WritableFile
from reshard.testing import run_ranks


def test_the_signal_is_there_before_the_main_thread_is_back_in_python() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    pipe = SignalPipe([signal.SIGUSR1])
    came: list[set[signal.Signals]] = []
    watcher = threading.Thread(target=lambda: came.append(pipe.wait(30)))
    watcher.start()
    # From another thread: only the interpreter's own handler runs at once.
    killer = threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGUSR1))
    killer.start()
    watcher.join()
    killer.join()
    assert came == [{signal.SIGUSR1}]
    pipe.close()
    assert signal.getsignal(signal.SIGUSR1) is before
    assert signal.set_wakeup_fd(-1) == -1


def _sleep(write: int) -> None:
    os.write(write, b"x")
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_signal_to_a_forked_child_is_none_of_the_runs() -> None:
    with reshard.GracefulStop(SingleProcess()) as stop:
        read, write = os.pipe()
        child = multiprocessing.get_context("fork").Process(target=_sleep, args=(write,))
        child.start()
        assert os.read(read, 1) == b"x"
        os.close(read)
        os.close(write)
        child.terminate()
        child.join()
        assert child.exitcode == -signal.SIGTERM
        time.sleep(0.2)
        assert stop.reason is None
        assert not stop.should_stop(1)


def test_the_wake_up_of_an_event_loop_stays_its_own() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    try:
        with reshard.GracefulStop(SingleProcess()) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert os.read(read, 1) == bytes([signal.SIGTERM])
            step = 1
            while not stop.should_stop(step):
                step += 1
            assert stop.reason == "SIGTERM"
    finally:
        assert signal.set_wakeup_fd(-1) == write
        os.close(read)
        os.close(write)


def test_a_process_that_is_stuck_ends_itself(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = """
import os, signal, threading, time
import reshard
from reshard.comm import SingleProcess
from reshard.stopping import graceful
graceful._LAST_SECONDS = 0.2
with reshard.GracefulStop(SingleProcess(), timeout=0.5) as stop:
    stop.should_stop(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)
"""
    done = run_python(code, check=False, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert "rank 0 did not come to the end of step 2 within 0.5 s" in done.stderr
    assert "Traceback" not in done.stderr


class Gate(PosixStorage):
    """A storage that creates no data file before it is let through."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def create(self, path: str, size: int) -> WritableFile:
        if path.endswith(".safetensors"):
            assert self.opened.wait(60)
        return super().create(path, size)


@pytest.mark.parametrize("async_save", ["copy", "deferred"])
def test_a_save_that_is_under_way_is_finished_before_the_last_one(tmp_path: Path, async_save: str) -> None:
    gates = [Gate(), Gate()]

    def work(comm: Communicator) -> int:
        gate = gates[comm.rank]
        model = {"w": np.zeros(8, np.float32)}
        with (
            reshard.CheckpointManager(tmp_path, async_save=async_save, storage=gate, communicator=comm) as manager,  # type: ignore[arg-type]
            reshard.GracefulStop(comm, signals=()) as stop,
        ):
            for step in range(1, 2000):
                model["w"][...] = step
                comm.barrier()
                if step == 3:
                    manager.save(step, model=model)
                    if comm.rank == 1:
                        stop.request("enough", urgent=True)
                if stop.should_stop(step):
                    gate.opened.set()
                    manager.save(step, model=model)
                    manager.wait()
                    return step
                time.sleep(0.001)
        raise AssertionError

    last, other = run_ranks(2, work)
    assert last == other
    assert sorted(path.name for path in tmp_path.glob("iteration_*")) == ["iteration_00000003", f"iteration_{last:08d}"]
    for step in (3, last):
        found = {"w": np.zeros(8, np.float32)}
        reshard.load(tmp_path / f"iteration_{step:08d}", model=found)
        assert (found["w"] == step).all()
