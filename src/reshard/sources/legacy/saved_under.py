"""A path together with the strategy under which what lies there was saved: Checkpoint 1.0 doesn't say it by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reshard.errors import UsageError
from reshard.sources.legacy.strategy import Strategy, strategy_of_table
from reshard.sources.legacy.strategy_files import read_strategy
from reshard.storage import Storage

GivenStrategy = str | os.PathLike[str] | Mapping[str, Any]
"""Strategy files by their path, or a table of layouts."""


@dataclass(frozen=True)
class SavedUnder:
    """A checkpoint of MindSpore's Checkpoint 1.0 and the strategy of the run that saved it. It can be given wherever a path can.

    Attributes:
        path: the directory of the ranks' directories (`rank_0`, `rank_1`, …), which means the newest save that all ranks have; or one
            rank's file, which means the save of all ranks that it is of.
        strategy: the strategy files that the run wrote: one file, or the directory of them; or a table of layouts in a JSON file; or such
            a table: for each pattern of names (globs; the first that fits counts) a `reshard.geometry.Layout`, a `mindspore.Layout` that
            was called with a tensor map, a mapping with `device_matrix` and `tensor_map`, or None for what every rank had whole. In a job
            rank 0's counts.
    """

    path: str | os.PathLike[str]
    strategy: GivenStrategy

    def __fspath__(self) -> str:
        return os.fspath(self.path)


def given_with(path: object) -> GivenStrategy | None:
    """The strategy that was given with a path; None where there is none."""
    return path.strategy if isinstance(path, SavedUnder) else None


def read_given(storage: Storage, given: GivenStrategy | None) -> Strategy | None:
    """What was given, read; None when nothing was.

    Raises:
        CheckpointNotFoundError: there are no strategy files at the path.
        MetadataError: they are damaged, or contradict each other.
        UsageError: something else than a path or a table of layouts.
        StorageError: the storage refuses.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        return strategy_of_table(given)
    if not isinstance(given, str | os.PathLike):
        raise UsageError("not a strategy", field="strategy", found=type(given).__name__, expected="a path, or a table of layouts")
    return read_strategy(storage, os.path.abspath(os.fspath(given)))
