"""Open a stored checkpoint of whatever kind: its directory's names say which."""

from __future__ import annotations

from reshard.sources.huggingface import holds_weights, open_weights
from reshard.sources.native import open_stored
from reshard.sources.stored import Stored
from reshard.storage import Storage


def open_source(storage: Storage, directory: str) -> Stored:
    """Open the directory that `resolve` found.

    Args:
        storage: where it lies.
        directory: of the checkpoint's files.

    Raises:
        ReshardError: as `open_stored` and `open_weights`.
    """
    there = storage.stat(directory)
    if (
        there is not None
        and there.is_directory
        and holds_weights({entry.name for entry in storage.list(directory) if not entry.is_directory})
    ):
        return open_weights(storage, directory)
    return open_stored(storage, directory)
