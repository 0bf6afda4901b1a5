"""The checkpoint that a configuration names, as Checkpoint 1.0 where it says so."""

from __future__ import annotations

import os

from reshard.config.fields import RunConfig
from reshard.sources.legacy.opening import path_of_legacy
from reshard.sources.legacy.saved_under import SavedUnder
from reshard.storage.posix import PosixStorage


def named_checkpoint(run: RunConfig) -> str | SavedUnder:
    """What `load_checkpoint` means.

    With `use_legacy_format: True` the directories of ranks count, where iterations lie beside them, and `src_strategy_path_or_dir` says how
    tensors were cut. Of which kind a checkpoint is its files say; so a path to Checkpoint 2.0 is one all the same.

    Args:
        run: the configuration; `load_checkpoint` is set.

    Raises:
        ReshardError: the save that is meant can't be known.
    """
    if not run.use_legacy_format:
        return run.load_checkpoint
    path = path_of_legacy(PosixStorage(), os.path.abspath(run.load_checkpoint))
    return path if run.src_strategy_path_or_dir is None else SavedUnder(path, run.src_strategy_path_or_dir)
