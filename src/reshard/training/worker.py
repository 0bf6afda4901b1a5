"""One rank of a run, from its start to its end."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
import warnings

import torch
import torch.distributed as dist

from reshard.config.sizes import parallel_sizes
from reshard.config.validation import Configuration
from reshard.errors import CommunicationError, ReshardError
from reshard.training.mesh import local_device, make_place
from reshard.training.outcome import EXIT_STOPPED, Outcome, write_outcome
from reshard.training.torch_learner import TorchLearner
from reshard.training.trainer import Trainer

# Longest wait for another rank; saving a large checkpoint is inside of it.
_TIMEOUT = datetime.timedelta(minutes=30)

# A user's mistake or a checkpoint's damage, explained; anything else ends with 1 and a traceback.
EXIT_EXPLAINED = 2
EXIT_UNEXPECTED = 1

# A rank whose peer died hears of it at once and fails too. It waits a moment (seconds), so that the launcher, which looks ten times a
# second and tells of the first failure that it sees, sees the peer.
_AFTER_YOU = 1.0


def run_rank(configuration: Configuration) -> Outcome:
    """Train as the rank that the environment says (`RANK`, `WORLD_SIZE`, as torchrun sets them), or alone.

    Raises:
        ReshardError: as `Trainer`.
    """
    if "OMP_NUM_THREADS" in os.environ:
        # A forked rank has inherited torch's own idea.
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = parallel_sizes(configuration.run, ranks)
    # FSDP warns of in-place changes to its output, whose gradients would be lost. Nothing here makes one.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    if ranks > 1:
        device = local_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        return Trainer(configuration, TorchLearner(configuration.run, make_place(sizes))).train()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def launched(configuration: Configuration, outcome_file: str) -> None:
    """What the launcher calls in each of its processes.

    An error goes into the launcher's error file, and the exit code says its kind. Ranks that were told to stop write into `outcome_file`
    how that went, each of them the same.
    """
    threading.Thread(target=_end_with_launcher, name="reshard-launcher-watch", daemon=True).start()
    try:
        outcome = run_rank(configuration)
        if outcome.reason is not None:
            write_outcome(outcome_file, outcome)
            # Not a return: who returns waits until the launcher has taken the result, and a signal has ended the launcher's listening.
            sys.exit(EXIT_STOPPED)
    except CommunicationError as error:
        _leave_error(error)
        time.sleep(_AFTER_YOU)
        sys.exit(EXIT_EXPLAINED)
    except ReshardError as error:
        _leave_error(error)
        sys.exit(EXIT_EXPLAINED)
    except Exception as error:  # noqa: BLE001 - whatever it was: the launcher says it, with its stack
        _leave_error(error)
        time.sleep(_AFTER_YOU)
        sys.exit(EXIT_UNEXPECTED)


def _end_with_launcher() -> None:
    """End this rank when its launcher is killed.

    The fork server between them lives as long as its ranks do, so the kernel's signal on a parent's death doesn't come.
    """
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os._exit(EXIT_UNEXPECTED)


def _leave_error(error: Exception) -> None:
    """Write the file in which torch's launcher looks for the reason of a failure."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    text = str(error) if isinstance(error, ReshardError) else traceback.format_exc()
    facts = {"kind": type(error).__name__, "rank": os.environ.get("RANK", "0")}
    extra = {"timestamp": str(int(time.time())), "py_callstack": text}
    with open(file, "w", encoding="utf-8") as output:
        json.dump({"message": {"message": text, "extraInfo": extra, **facts}}, output)
