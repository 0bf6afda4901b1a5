"""Whether a checkpoint is intact, as far as that can be told without reading its data."""

from __future__ import annotations

from collections.abc import Mapping

from reshard.catalog import Catalog
from reshard.errors import MetadataError
from reshard.format.index import INDEX_FILE
from reshard.format.names import DATA_SUFFIX, EXTRA_DIRECTORY
from reshard.format.safetensors import read_header
from reshard.format.seal import Seal
from reshard.sources.native import check_promises, open_stored
from reshard.sources.stored import Headers
from reshard.storage import Storage
from reshard.storage.storage import join


def check_at_a_glance(storage: Storage, directory: str) -> None:
    """Hold seal, metadata, training information, names and sizes of all files, and the headers of data and extras against each other.

    Args:
        storage: where the checkpoint lies.
        directory: its directory.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        DamagedCheckpointError: something is not as it was saved.
        StorageError: the storage refuses.
    """
    stored = open_stored(storage, directory)
    sizes, _ = measure(storage, directory)
    problem = missing_data(stored.catalog, sizes) if stored.seal is None else missing_files(stored.seal, sizes)
    if problem is not None:
        raise MetadataError(problem, file=directory)
    check_promises(stored.catalog, Headers(storage, directory, stored.seal))
    files = {} if stored.seal is None else stored.seal.files
    for name, sealed in files.items():
        if name.startswith(f"{EXTRA_DIRECTORY}/") and name.endswith(DATA_SUFFIX):
            read_header(storage, join(directory, name), sealed)


def measure(storage: Storage, directory: str) -> tuple[dict[str, int], float]:
    """The files that lie in a directory and below it (paths inside it) with their sizes, and the last modification.

    Raises:
        StorageError: the storage refuses.
    """
    sizes: dict[str, int] = {}
    modified = 0.0
    waiting = [""]
    while waiting:
        below = waiting.pop()
        path = join(directory, below) if below else directory
        links = storage.links_out(path)
        for entry in storage.list(path):
            name = join(below, entry.name)
            if entry.is_directory:
                if entry.name in links:  # whose that is, and how much, nobody knows
                    continue
                waiting.append(name)
                continue
            sizes[name] = entry.size
            modified = max(modified, entry.modified)
    return sizes, modified


def missing_data(catalog: Catalog, sizes: Mapping[str, int]) -> str | None:
    """What data is missing of a checkpoint without a seal, as far as the names and sizes of files tell; None when nothing is.

    No file is opened: a root may hold many thousands of them.
    """
    promised: dict[str, int] = {}
    for tensor in catalog.tensors.values():
        for chunk in tensor.chunks:
            nbytes = chunk.region.size * tensor.dtype.itemsize
            for place in chunk.places:
                promised[place.file] = promised.get(place.file, 0) + nbytes
    missing = sorted(file for file in promised if file not in sizes)
    if missing:
        return f"{len(missing)} of {len(promised)} data files {'is' if len(missing) == 1 else 'are'} missing ({missing[0]})"
    short = sorted(file for file, nbytes in promised.items() if sizes[file] < nbytes)
    if short:
        return f"{len(short)} of {len(promised)} data files {'is' if len(short) == 1 else 'are'} truncated ({short[0]})"
    return None


def missing_files(seal: Seal, sizes: Mapping[str, int]) -> str | None:
    """What is missing of all that the seal lists, likewise; None when nothing is."""
    # It can be deleted: a reader makes it anew.
    needed = {name: file.size for name, file in seal.files.items() if name != join(EXTRA_DIRECTORY, INDEX_FILE)}
    missing = sorted(needed.keys() - sizes.keys())
    if missing:
        return f"{len(missing)} of {len(needed)} files {'is' if len(missing) == 1 else 'are'} missing ({missing[0]})"
    changed = sorted(name for name, size in needed.items() if sizes[name] != size)
    if changed:
        return f"{len(changed)} of {len(needed)} files {'has' if len(changed) == 1 else 'have'} another size than when saved ({changed[0]})"
    return None
