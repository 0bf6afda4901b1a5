"""What one rank reads of a checkpoint for all ranks of a job."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import msgspec

from reshard.catalog import Catalog
from reshard.format.common import read_common
from reshard.format.index import decode_index
from reshard.format.names import COMMON_FILE, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE
from reshard.format.seal import Seal
from reshard.sources.huggingface import read_config_bytes
from reshard.sources.items import ItemTable
from reshard.sources.legacy.saved_under import GivenStrategy
from reshard.sources.opening import headers_of, open_source
from reshard.sources.pytorch.naming import Prefixes
from reshard.sources.stored import Headers
from reshard.storage import Storage
from reshard.storage.memory import MemoryStorage
from reshard.storage.storage import join


class Relayed(msgspec.Struct, array_like=True, dict=True):
    """What one rank has read, to be sent to the others. That rank keeps the catalog that it has seen already.

    Attributes:
        index: the catalog, as an index.
        directory: where the files lie.
        seal: the checkpoint's; None when it has none.
        files: the bytes of small files, by path; None when every rank reads them itself.
        is_weights: whether it is a model's weights and nothing else.
        items: as in `Stored`.
        config: the model's description (`config.json`) as it lies in the directory; None when there is none.
    """

    index: bytes
    directory: str
    seal: Seal | None = None
    files: dict[str, bytes] | None = None
    is_weights: bool = False
    items: ItemTable | None = None
    config: bytes | None = None

    @cached_property
    def catalog(self) -> Catalog | None:
        """What the index says; None when it can't be understood."""
        return decode_index(self.index, self.directory)

    def storage(self, storage: Storage) -> Storage:
        """Where to read the small files: what was sent, else the storage itself."""
        if self.files is None:
            return storage
        return held_in_memory(self.files)

    def headers(self, storage: Storage, catalog: Catalog, *, digests: bool) -> Headers:
        """Where in its files the tensors of the catalog lie; with their digests or without."""
        return headers_of(storage, catalog, self.seal, self.items, digests=digests)


def held_in_memory(files: Mapping[str, bytes]) -> Storage:
    """Small files by path, as a storage."""
    held = MemoryStorage()
    for path, data in files.items():
        held.make_directory(path.rpartition("/")[0])
        held.write_bytes(path, data)
    return held


def read_for_all(
    storage: Storage,
    directory: str,
    *,
    balanced: bool,
    prefixes: Prefixes = Prefixes(),  # noqa: B008 - frozen
    strategy: GivenStrategy | None = None,
) -> Relayed:
    """Read what all ranks need: on one of them.

    Args:
        storage: where the checkpoint lies.
        directory: its directory, or the file that is all of it.
        balanced: whether the training information and the extras are read for the others, too.
        prefixes: as in `open_source`.
        strategy: likewise.

    Raises:
        ReshardError: as `open_source` and `read_common`.
    """
    stored = open_source(storage, directory, prefixes, strategy)
    index, where = stored.encode_index(), stored.catalog.directory
    # Beside a file that is all of a checkpoint there may be another model's.
    config = read_config_bytes(storage, directory) if where == directory else None
    if stored.items is not None:
        files = {join(directory, name): data for name, data in stored.files.items()}
        return Relayed(index, where, None, files, stored.is_weights, stored.items, config)
    relayed = Relayed(index, where, stored.seal, is_weights=stored.is_weights, config=config)
    if stored.index is not None:
        relayed.catalog = stored.catalog  # which the index says: it was made of it
    if not balanced:
        return relayed
    common = join(directory, COMMON_FILE)
    # Whether it is sound, before it goes to everyone.
    read_common(storage, common)
    relayed.files = files = {}
    for path in (common, join(directory, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE)):
        if storage.stat(path) is not None:
            files[path] = storage.read_bytes(path)
    return relayed
