"""Open a stored checkpoint of whatever kind: its directory's names say which."""

from __future__ import annotations

from reshard.catalog import Catalog
from reshard.format.seal import Seal
from reshard.sources.huggingface import holds_weights, open_weights
from reshard.sources.items import ItemTable
from reshard.sources.native import open_stored
from reshard.sources.pytorch.dcp import is_dcp, open_dcp
from reshard.sources.pytorch.items import ItemHeaders
from reshard.sources.pytorch.naming import Prefixes
from reshard.sources.pytorch.saved_file import is_saved_file, open_saved_file
from reshard.sources.pytorch.saved_folder import is_saved_folder, open_saved_folder
from reshard.sources.stored import Headers, Stored
from reshard.storage import Storage


def open_source(storage: Storage, path: str, prefixes: Prefixes = Prefixes()) -> Stored:  # noqa: B008 - frozen
    """Open what `resolve` found.

    Args:
        storage: where it lies.
        path: the directory of the checkpoint's files, or the file that is all of it.
        prefixes: where model and optimizer begin in a foreign checkpoint's keys, as far as the caller says.

    Raises:
        ReshardError: as `open_stored`, `open_weights`, `open_dcp`, `open_saved_file` and `open_saved_folder`.
    """
    there = storage.stat(path)
    if there is None:
        return open_stored(storage, path)
    if not there.is_directory:
        return open_saved_file(storage, path, prefixes)
    names = {entry.name for entry in storage.list(path) if not entry.is_directory}
    if is_dcp(names):
        return open_dcp(storage, path, prefixes)
    if is_saved_folder(names):
        return open_saved_folder(storage, path)
    return open_weights(storage, path) if holds_weights(names) else open_stored(storage, path)


def is_foreign(storage: Storage, path: str) -> bool:
    """Whether what `resolve` found was written by PyTorch alone: nothing in it says which bytes it must have."""
    there = storage.stat(path)
    if there is None:
        return False
    if not there.is_directory:
        return is_saved_file(storage, path)
    names = {entry.name for entry in storage.list(path) if not entry.is_directory}
    return is_dcp(names) or is_saved_folder(names)


def headers_of(storage: Storage, catalog: Catalog, seal: Seal | None, items: ItemTable | None) -> Headers:
    """What tells where in its files the tensors of an opened checkpoint lie.

    Args:
        storage: where they lie.
        catalog: of the checkpoint.
        seal: the checkpoint's, or None.
        items: its table of items, or None.
    """
    return Headers(storage, catalog.directory, seal) if items is None else ItemHeaders(storage, catalog, items)
