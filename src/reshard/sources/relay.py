"""What one rank reads of a checkpoint for all ranks of a job."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from reshard.catalog import Catalog
from reshard.format.common import read_common
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


class Relayed(msgspec.Struct, array_like=True):
    """What one rank has read, to be sent to the others.

    Attributes:
        index: the catalog, as an index.
        seal: the checkpoint's; None when it has none.
        files: the bytes of small files, by path; None when every rank reads them itself.
        is_weights: whether it is a model's weights and nothing else.
        directory: where the files lie; None for the path that was opened.
        items: as in `Stored`.
        config: the model's description (`config.json`) as it lies in the directory; None when there is none.
    """

    index: bytes
    seal: Seal | None = None
    files: dict[str, bytes] | None = None
    is_weights: bool = False
    directory: str | None = None
    items: ItemTable | None = None
    config: bytes | None = None

    def storage(self, storage: Storage) -> Storage:
        """Where to read the small files: what was sent, else the storage itself."""
        if self.files is None:
            return storage
        return held_in_memory(self.files)

    def headers(self, storage: Storage, catalog: Catalog) -> Headers:
        """Where in its files the tensors of the catalog lie."""
        return headers_of(storage, catalog, self.seal, self.items)


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
    index = stored.encode_index()
    # Beside a file that is all of a checkpoint there may be another model's.
    config = read_config_bytes(storage, directory) if stored.catalog.directory == directory else None
    if stored.items is not None:
        files = {join(directory, name): data for name, data in stored.files.items()}
        return Relayed(index, None, files, stored.is_weights, stored.catalog.directory, stored.items, config)
    if not balanced:
        return Relayed(index, stored.seal, is_weights=stored.is_weights, config=config)
    common = join(directory, COMMON_FILE)
    # Whether it is sound, before it goes to everyone.
    read_common(storage, common)
    files = {}
    for path in (common, join(directory, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE)):
        if storage.stat(path) is not None:
            files[path] = storage.read_bytes(path)
    return Relayed(index, stored.seal, files, stored.is_weights, config=config)
