"""Starts the ranks of a run on this machine, through the launcher of its framework."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from multiprocessing import forkserver
from typing import Any

from reshard.config.fields import Framework, RunConfig
from reshard.config.sizes import batch_sizes, expected_ranks, parallel_sizes
from reshard.config.validation import Configuration
from reshard.errors import ConfigError
from reshard.training.failures import RankFailedError, error_of_rank
from reshard.training.mindspore.launcher import launch_under_msrun

# Imported once by the process that all ranks are forked from: torch and transformers cost seconds, and ranks share few processors.
_PRELOADED = ("reshard.training.preload",)

# Ranks that a signal stops have this long (seconds) to save, the launcher's own default among them.
_GRACE = 30.0


def launch(configuration: Configuration, nproc: int | None = None) -> None:
    """Train as the environment says: as a plain worker where torchrun, msrun or a scheduler has started this process, else with ranks of
    our own.

    Args:
        configuration: what to do.
        nproc: how many ranks to start; None: as many as the parallel sizes make up.

    Raises:
        ReshardError: as the first rank that failed.
        RankFailedError: a rank failed with something else.
        SystemExit: the run was stopped before its last step; with the code of `Outcome.exit_code`. A rank that torchrun or a scheduler
            started ends with 0 when its last step is saved: they would take anything else for a failure.
    """
    run = configuration.run
    started = _ranks_started(run.framework)
    if started is not None:
        _check_sizes(run, started, nproc)
        _run_here(configuration, is_worker=True)
        return
    ranks = nproc if nproc is not None else expected_ranks(run)
    _check_sizes(run, ranks, nproc)
    # Before torch is imported: one thread a rank, unless the user knows better.
    if ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        if run.framework == "mindspore":
            launch_under_msrun(configuration, ranks)
        else:
            _launch_elastic(configuration, ranks)
    else:
        _run_here(configuration, is_worker=False)


def _ranks_started(framework: Framework) -> int | None:
    """How many ranks there are, where this process was started as one of them; None where it wasn't.

    Raises:
        ConfigError: it was, by the launcher of another framework.
    """
    by_torchrun, by_msrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ, "MS_ROLE" in os.environ
    mine, other = (by_msrun, by_torchrun) if framework == "mindspore" else (by_torchrun, by_msrun)
    if other and not mine:
        launchers = {"mindspore": "msrun", "torch": "torchrun"}
        raise ConfigError(
            "this process was started by the launcher of another framework",
            field="framework",
            found=f"{framework}, and the environment of {launchers['torch' if framework == 'mindspore' else 'mindspore']}",
            expected=f"{launchers[framework]}, or no launcher: reshard starts ranks by itself",
        )
    if not mine:
        return None
    return int(os.environ["MS_WORKER_NUM" if framework == "mindspore" else "WORLD_SIZE"])


def _check_sizes(run: RunConfig, ranks: int, nproc: int | None) -> None:
    """What is wrong with the sizes shows before anything is started."""
    if nproc is not None and nproc != ranks:
        raise ConfigError(
            "this process was started as one of several ranks already",
            field="--nproc",
            found=nproc,
            expected=f"{ranks}, as the environment says",
            fix="leave --nproc out under torchrun and msrun",
        )
    batch_sizes(run, parallel_sizes(run, ranks))


def _run_here(configuration: Configuration, *, is_worker: bool) -> None:
    from reshard.training.outcome import EXIT_STOPPED

    if configuration.run.framework == "mindspore":
        from reshard.training.mindspore.worker import run_rank
    else:
        from reshard.training.worker import run_rank

    code = run_rank(configuration).exit_code
    if code and not (is_worker and code == EXIT_STOPPED):
        raise SystemExit(code)


def _launch_elastic(configuration: Configuration, ranks: int) -> None:
    forkserver.set_forkserver_preload(list(_PRELOADED))
    # It imports while this process does.
    forkserver.ensure_running()

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from reshard.training.outcome import EXIT_STOPPED, read_outcome

    if sys.platform == "linux":
        # All ranks are on this machine, and its name may lead nowhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _silence_launcher()
    with tempfile.TemporaryDirectory(prefix="reshard-launch-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=f"reshard-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        outcome_file = os.path.join(logs, "outcome.json")
        # As a shell says it of a process that a signal ended.
        code = 0
        try:
            elastic_launch(config, _rank)(configuration, outcome_file)
        except ChildFailedError as failed:
            if failed.get_first_failure()[1].exitcode != EXIT_STOPPED:
                raise _error_of(failed) from None
        except SignalException as stopped:
            code = 128 + stopped.sigval
            _wait_for_ranks()
        outcome = read_outcome(outcome_file)
    code = code if outcome is None else outcome.exit_code
    if code:
        raise SystemExit(code)


def _wait_for_ranks() -> None:
    """The launcher has told the ranks, and has waited for them, unless a second signal came meanwhile: that changes nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    deadline = time.monotonic() + _GRACE
    for rank in multiprocessing.active_children():
        rank.join(max(deadline - time.monotonic(), 0))


def _rank(configuration: Configuration, outcome_file: str) -> None:
    """What runs in each rank's process. Only there is the trainer imported, or found imported already."""
    from reshard.training.worker import launched

    launched(configuration, outcome_file)


def _error_of(failed: Any) -> Exception:
    """The error of the rank that failed first, as it was raised there."""
    _, failure = failed.get_first_failure()
    message = failure.message
    if not isinstance(message, dict):
        return RankFailedError(f"rank {failure.local_rank} died: {message}")
    return error_of_rank(message["kind"], message["message"], message["rank"])


def _silence_launcher() -> None:
    """The launcher logs every failure at length, with its own stack; what failed is said once, by us."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
