"""Open a stored checkpoint of whatever kind: its directory's names say which."""

from __future__ import annotations

from reshard.catalog import Catalog
from reshard.format.seal import Seal
from reshard.sources.huggingface import holds_weights, open_weights
from reshard.sources.items import ItemTable
from reshard.sources.legacy.opening import is_legacy_file, open_legacy
from reshard.sources.legacy.ranks import is_legacy_directory
from reshard.sources.legacy.saved_under import GivenStrategy, read_given
from reshard.sources.native import open_stored
from reshard.sources.pytorch.dcp import is_dcp, open_dcp
from reshard.sources.pytorch.items import ItemHeaders
from reshard.sources.pytorch.naming import Prefixes
from reshard.sources.pytorch.saved_file import is_saved_file, open_saved_file
from reshard.sources.pytorch.saved_folder import is_saved_folder, open_saved_folder
from reshard.sources.stored import Headers, Stored
from reshard.storage import Storage


def open_source(
    storage: Storage,
    path: str,
    prefixes: Prefixes = Prefixes(),  # noqa: B008 - frozen
    strategy: GivenStrategy | None = None,
) -> Stored:
    """Open what `resolve` found.

    Args:
        storage: where it lies.
        path: the directory of the checkpoint's files, or the file that is all of it.
        prefixes: where model and optimizer begin in a foreign checkpoint's keys, as far as the caller says.
        strategy: under which it was saved, where it doesn't say so itself.

    Raises:
        ReshardError: as `open_stored`, `open_weights`, `open_dcp`, `open_saved_file`, `open_saved_folder` and `open_legacy`.
    """
    there = storage.stat(path)
    if there is None:
        return open_stored(storage, path)
    if not there.is_directory:
        is_legacy = is_legacy_file(storage, path)
        return open_legacy(storage, path, read_given(storage, strategy)) if is_legacy else open_saved_file(storage, path, prefixes)
    entries = storage.list(path)
    names = {entry.name for entry in entries if not entry.is_directory}
    if is_dcp(names):
        return open_dcp(storage, path, prefixes)
    if is_saved_folder(names):
        return open_saved_folder(storage, path)
    if is_legacy_directory(storage, path, entries):
        return open_legacy(storage, path, read_given(storage, strategy))
    return open_weights(storage, path) if holds_weights(names) else open_stored(storage, path)


def is_foreign(storage: Storage, path: str) -> bool:
    """Whether what `resolve` found was written by PyTorch or MindSpore alone: nothing in it says which bytes it must have."""
    there = storage.stat(path)
    if there is None:
        return False
    if not there.is_directory:
        return is_saved_file(storage, path) or is_legacy_file(storage, path)
    entries = storage.list(path)
    names = {entry.name for entry in entries if not entry.is_directory}
    return is_dcp(names) or is_saved_folder(names) or is_legacy_directory(storage, path, entries)


def headers_of(storage: Storage, catalog: Catalog, seal: Seal | None, items: ItemTable | None, *, digests: bool = True) -> Headers:
    """What tells where in its files the tensors of an opened checkpoint lie.

    Args:
        storage: where they lie.
        catalog: of the checkpoint.
        seal: the checkpoint's, or None.
        items: its table of items, or None.
        digests: whether anybody wants those of the tensors.
    """
    return Headers(storage, catalog.directory, seal, digests=digests) if items is None else ItemHeaders(storage, catalog, items)
