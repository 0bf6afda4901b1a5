"""How a run ended: its exit code, and the file that tells a scheduler's script."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from reshard.errors import StorageError

STOPPED_FILE = "stopped.json"

EXIT_STOPPED = 75
"""The run stopped before its last step, as it was told to, and can go on: `EX_TEMPFAIL` of sysexits.h, "try again"."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: `finished`: its last step is done. `stopped`: it was told to stop before.
        step: the last step that is done.
        reason: why it was told to stop: `SIGTERM`, `time limit`; a run whose last step it was is finished all the same.
        saved: whether that step is saved.
        details: why not, if it should have been.
    """

    state: Literal["finished", "stopped"]
    step: int
    reason: str | None = None
    saved: bool = False
    details: str | None = None

    @property
    def exit_code(self) -> int:
        """That of `reshard train`: 0 when the run is finished, 128 and the number of the signal that stopped it when steps were lost by
        that, else 75.
        """
        if self.state == "finished":
            return 0
        by_signal = self.reason in signal.Signals.__members__
        return 128 + signal.Signals[self.reason or ""] if by_signal and not self.saved else EXIT_STOPPED

    def __str__(self) -> str:
        saved = "saved" if self.saved else "not saved"
        return f"after step {self.step} ({self.reason}), which is {saved}" if self.state == "stopped" else f"step {self.step} was the last"


def write_outcome(path: str | os.PathLike[str], outcome: Outcome) -> None:
    """Write an outcome as JSON, with the `time` (seconds since the epoch): the whole file or none, and durable.

    Raises:
        StorageError: it can't be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w", encoding="utf-8") as file:
            json.dump({**asdict(outcome), "time": time.time()}, file)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise StorageError(f"how the run ended can't be written: {error.strerror}", file=path) from error


def read_outcome(path: str | os.PathLike[str]) -> Outcome | None:
    """The outcome in a file; None when there is none, or something else is in it."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        said = json.loads(Path(path).read_text(encoding="utf-8"))
        del said["time"]
        return Outcome(**said)
    return None
