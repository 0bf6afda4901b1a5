"""What a launcher and the ranks that msrun started for it tell each other: files in a directory of their own."""

from __future__ import annotations

import fcntl
import json
import os
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reshard.config.fields import RunConfig
from reshard.config.validation import Configuration
from reshard.errors import ReshardError


@dataclass(frozen=True)
class RankError:
    """What a rank failed with.

    Attributes:
        rank: the rank.
        kind: the name of the error's class.
        message: its text, with the stack where it isn't one of this package's.
        time: when, in seconds since the epoch.
    """

    rank: int
    kind: str
    message: str
    time: float


@dataclass(frozen=True)
class Job:
    """The directory of one launch.

    Attributes:
        directory: exists; readable by its owner only.
    """

    directory: Path

    @property
    def outcome_file(self) -> Path:
        """Where ranks that were told to stop write how that went, each of them the same."""
        return self.directory / "outcome.json"

    def log(self, rank: int) -> Path:
        """What a rank has printed: msrun's name for it."""
        return self.directory / f"worker_{rank}.log"

    def write_configuration(self, configuration: Configuration) -> None:
        """For the ranks: what to do."""
        said = {"notes": configuration.notes, "file": configuration.file}
        (self.directory / "notes.json").write_text(json.dumps(said), encoding="utf-8")
        (self.directory / "run.json").write_text(configuration.run.model_dump_json(), encoding="utf-8")

    def read_configuration(self) -> Configuration:
        """What `write_configuration` wrote."""
        said = json.loads((self.directory / "notes.json").read_text(encoding="utf-8"))
        run = RunConfig.model_validate_json((self.directory / "run.json").read_text(encoding="utf-8"))
        return Configuration(run, tuple(said["notes"]), said["file"])

    def register(self, rank: int) -> Any:
        """Called by a rank: it lives as long as what this returns is open, or the process ends, however it does."""
        file = open(self.directory / f"rank-{rank}.tmp", "w", encoding="ascii")  # noqa: SIM115 - open for life
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(os.getpid()))
        file.flush()
        os.replace(file.name, self._life(rank))
        return file

    def process_of(self, rank: int) -> int | None:
        """The process of a rank, as far as it lives; None before and after."""
        with suppress(FileNotFoundError), open(self._life(rank), "r+", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read())
        return None

    def rank_of(self, process: int, ranks: int) -> int | None:
        """The rank of a process that has registered, whether it lives or not."""
        for rank in range(ranks):
            with suppress(FileNotFoundError):
                if self._life(rank).read_text(encoding="ascii") == str(process):
                    return rank
        return None

    def has_begun(self, rank: int) -> bool:
        """Whether a rank has registered."""
        return self._life(rank).exists()

    def note_end(self, rank: int) -> None:
        """Called by a rank that has done what it was to do."""
        (self.directory / f"end-{rank}").touch()

    def has_ended(self, rank: int) -> bool:
        """Whether a rank has said that it has done what it was to do."""
        return (self.directory / f"end-{rank}").exists()

    def note_error(self, rank: int, error: Exception) -> None:
        """Called by a rank that failed, in the handler of the error."""
        text = str(error) if isinstance(error, ReshardError) else traceback.format_exc()
        said = {"rank": rank, "kind": type(error).__name__, "message": text, "time": time.time()}
        path = self.directory / f"error-{rank}.json"
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(said), encoding="utf-8")
        os.replace(beside, path)

    def errors(self) -> list[RankError]:
        """What ranks have failed with, in the order in which it happened."""
        found = [RankError(**json.loads(path.read_text(encoding="utf-8"))) for path in self.directory.glob("error-*.json")]
        return sorted(found, key=lambda error: error.time)

    def _life(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}"
