"""One rank of a run under MindSpore. The launcher's msrun starts this module; under a user's own msrun the command calls `run_rank`."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from pathlib import Path

from reshard.config.sizes import parallel_sizes
from reshard.config.validation import Configuration
from reshard.errors import CommunicationError, ReshardError
from reshard.training.mindspore.job import Job
from reshard.training.outcome import Outcome, write_outcome

# As under PyTorch: a user's mistake or a checkpoint's damage, explained; anything else.
EXIT_EXPLAINED = 2
EXIT_UNEXPECTED = 1

# A rank whose peer died fails too. It waits a moment (seconds), so that msrun, which looks once a second and tells of one failure only,
# tells of the peer's.
_AFTER_YOU = 2.0


def run_rank(configuration: Configuration) -> Outcome:
    """Train as the rank that msrun's environment says, or alone.

    In the process of msrun's scheduler it doesn't return: MindSpore ends that process when the ranks are done.

    Raises:
        ReshardError: as `Trainer`.
    """
    rank, ranks = 0, 1
    if "MS_ROLE" in os.environ:
        # Before anything else: the scheduler goes no further.
        from mindspore import communication

        communication.init()
        rank, ranks = communication.get_rank(), communication.get_group_size()
    sizes = parallel_sizes(configuration.run, ranks)

    from reshard.training.mindspore.learner import MindSporeLearner
    from reshard.training.trainer import Trainer

    return Trainer(configuration, MindSporeLearner(configuration.run, rank, sizes)).train()


def launched(job: Job, launcher: int) -> None:
    """What the launcher has msrun call in each process.

    Args:
        job: where ranks and launcher meet.
        launcher: its process.
    """
    threading.Thread(target=_end_with, args=(launcher,), name="reshard-launcher-watch", daemon=True).start()
    configuration = job.read_configuration()
    if os.environ["MS_ROLE"] == "MS_SCHED":
        run_rank(configuration)
        return
    rank = int(os.environ["RANK_ID"])
    life = job.register(rank)
    try:
        outcome = run_rank(configuration)
        if outcome.reason is not None:
            write_outcome(job.outcome_file, outcome)
        # Whatever the outcome, the process ends with 0: msrun kills the others of one that doesn't.
        job.note_end(rank)
        _fall_silent()
    except Exception as error:  # noqa: BLE001 - whatever it was: the launcher says it, with its stack
        job.note_error(rank, error)
        if isinstance(error, CommunicationError) or not isinstance(error, ReshardError):
            time.sleep(_AFTER_YOU)
        sys.stdout.flush()
        # At once: MindSpore's own end waits for ranks that may wait for this one.
        os._exit(EXIT_EXPLAINED if isinstance(error, ReshardError) else EXIT_UNEXPECTED)
    life.close()


def _fall_silent() -> None:
    """Nothing more is for the user: while MindSpore takes itself apart it logs whatever level it was told."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _end_with(launcher: int) -> None:
    """End this process when its launcher is killed: msrun, between them, wouldn't notice."""
    try:
        handle = os.pidfd_open(launcher)
        select.select([handle], [], [])
    except ProcessLookupError:
        pass
    except (AttributeError, OSError):
        # A system without such handles.
        while _is_there(launcher):
            time.sleep(0.5)
    os._exit(EXIT_UNEXPECTED)


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    launched(Job(Path(sys.argv[1])), int(sys.argv[2]))
