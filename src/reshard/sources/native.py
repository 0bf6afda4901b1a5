"""Checkpoint 2.0, as this project and MindSpore Transformers write it: a directory becomes a catalog."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from reshard.catalog import Arrangement, Catalog, Piece, Place, Site, StoredTensor
from reshard.errors import CheckpointNotFoundError, DataFileError, MetadataError
from reshard.format.common import read_common
from reshard.format.extra import FrameworkArray, read_extra
from reshard.format.index import INDEX_FILE, decode_index
from reshard.format.metadata import MOST_METADATA_BYTES, SEALED_SINCE, decode_metadata
from reshard.format.names import (
    COMMON_FILE,
    DATA_SUFFIX,
    EXTRA_DIRECTORY,
    GLOBAL_EXTRA_FILE,
    METADATA_FILE,
    is_tensor_name,
    kind_of_file,
    parse_tensor_name,
    total_of_file,
)
from reshard.format.seal import SEAL_FILE, Seal, SealedFile, read_seal
from reshard.format.small_file import digest_small, read_small
from reshard.geometry import DType, Region
from reshard.sources.stored import Headers, Stored
from reshard.state import Kind, TensorKey
from reshard.storage import Storage
from reshard.storage.storage import join

_RESTORE = "restore the file from a copy, or resume from another iteration"


def open_stored(storage: Storage, directory: str) -> Stored:
    """Open a checkpoint's directory: by its compact index where that is up to date, else by its metadata.

    With `metadata.json` no data file is looked at, except where metadata leaves an element type open: `Headers.entry` and
    `check_promises` hold the files against it. Without it (a single card's checkpoint) every tensor of every file is a whole one. What is
    small and of the whole checkpoint is held against the seal here; headers are when they are read.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        MetadataError: the metadata is damaged; or it is missing and the files are those of several ranks, or there are none; or what this
            project writes beside it is missing, damaged, or not what was sealed; or a symbolic link leads out of the directory.
        DataFileError: a file whose header is needed is missing or damaged.
    """
    there = storage.stat(directory)
    if there is None or not there.is_directory:
        raise CheckpointNotFoundError("there is no such checkpoint", file=directory)
    check_links(storage, directory)
    seal = read_seal(storage, directory)
    catalog, index = _open(storage, directory, seal)
    if seal is None:
        if catalog.format_version is not None and catalog.format_version >= SEALED_SINCE:
            raise _missing(join(directory, SEAL_FILE))
        catalog = replace(catalog, notes=(*catalog.notes, f"no {SEAL_FILE}: whether its bytes are those that were saved can't be known"))
        index = None
    return Stored(catalog, seal, index)


def check_links(storage: Storage, directory: str) -> None:
    """See that all of a checkpoint lies in its directory: whoever made it says nothing of what lies elsewhere on this machine.

    Raises:
        MetadataError: a symbolic link leads out.
        StorageError: the storage refuses.
    """
    extra = join(directory, EXTRA_DIRECTORY)
    links = [join(directory, name) for name in storage.links_out(directory)]
    if not links and storage.stat(extra) is not None:
        links = [join(extra, name) for name in storage.links_out(extra)]
    if links:
        raise MetadataError(
            "a symbolic link leads out of the checkpoint's directory",
            file=links[0],
            found=f"{len(links)} such links" if len(links) > 1 else "a link",
            expected="files of the checkpoint",
            fix="if you trust what it leads to, put a copy of it in the link's place",
        )


def open_catalog(storage: Storage, directory: str) -> Catalog:
    """The catalog of a checkpoint's directory.

    Raises:
        ReshardError: as in `open_stored`.
    """
    return open_stored(storage, directory).catalog


def read_own_extra(
    storage: Storage, directory: str, name: str, seal: Seal | None, from_value: Callable[[FrameworkArray], Any] | None = None
) -> Any:
    """The tree of one of a checkpoint's files of extras; None when the checkpoint has no such file.

    Args:
        storage: where it lies.
        directory: of the checkpoint.
        name: of the file in the directory of extras.
        seal: the checkpoint's: then what it lists must be there, and what it doesn't list isn't looked at.
        from_value: as in `read_extra`.

    Raises:
        DamagedCheckpointError: the file is missing or damaged, or isn't the one that was sealed.
        StorageError: the storage refuses.
    """
    inside = join(EXTRA_DIRECTORY, name)
    sealed = None if seal is None else seal.files.get(inside)
    if seal is not None and sealed is None:
        return None
    return read_extra(storage, join(directory, inside), from_value, sealed=sealed)


def _open(storage: Storage, directory: str, seal: Seal | None) -> tuple[Catalog, bytes | None]:
    headers = Headers(storage, directory, seal)
    file = join(directory, METADATA_FILE)
    if storage.stat(file) is not None:
        sealed = None if seal is None else seal.file(METADATA_FILE, file)
        index, catalog = _read_index(storage, directory, file, sealed)
        if catalog is None:
            metadata = read_small(storage, file, MOST_METADATA_BYTES, error=MetadataError)
            if sealed is not None:
                sealed.check(metadata, file)
            index, catalog = None, decode_metadata(metadata, file, lambda place: _dtype_in(headers, place, directory))
        if catalog.format_version is not None:
            _check_companions(storage, directory, seal)
        return catalog, index
    if seal is not None:
        raise _missing(file, SEAL_FILE)
    files = [entry.name for entry in storage.list(directory) if not entry.is_directory and entry.name.endswith(DATA_SUFFIX)]
    if not files:
        raise MetadataError(
            f"the checkpoint has neither {METADATA_FILE} nor data files",
            file=directory,
            found="a save that never finished, or another kind of directory",
            fix="resume from another iteration",
        )
    ranks = max(total_of_file(name) or 1 for name in files)
    if ranks > 1:
        raise MetadataError(
            f"{METADATA_FILE} is missing from a checkpoint of several ranks: nobody knows which part of a tensor each file holds",
            file=directory,
            found=f"{len(files)} data files, named as of {ranks} ranks",
            expected=f"{METADATA_FILE} beside them; only a single card's checkpoint can do without",
            fix=f"restore {METADATA_FILE} from a copy, or resume from another iteration",
        )
    return _whole_tensors(headers, directory, files), None


def _read_index(storage: Storage, directory: str, metadata_file: str, sealed: SealedFile | None) -> tuple[bytes | None, Catalog | None]:
    """The checkpoint's index, and the catalog that it says; None where there is none that is up to date.

    Raises:
        MetadataError: the metadata isn't the one that was sealed.
    """
    index_file = join(directory, EXTRA_DIRECTORY, INDEX_FILE)
    found = storage.stat(index_file)
    # It says the same as the metadata in fewer bytes; one that is larger is nobody's index.
    if found is None or found.size > MOST_METADATA_BYTES:
        return None, None
    nbytes, digest = digest_small(storage, metadata_file, MOST_METADATA_BYTES, error=MetadataError)
    if sealed is not None:
        sealed.check_digest(nbytes, digest, metadata_file)
    index = storage.read_bytes(index_file)
    return index, decode_index(index, directory, digest)


def _check_companions(storage: Storage, directory: str, seal: Seal | None) -> None:
    """See that what we write into every checkpoint beside the tensors is there: without it a run would resume with the wrong step,
    schedule, data and hyper-parameters, and nobody would notice.
    """
    common = join(directory, COMMON_FILE)
    extra = join(directory, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE)
    for path in (common, extra):
        if storage.stat(path) is None:
            raise _missing(path)
    if seal is not None:
        read_common(storage, common, seal.file(COMMON_FILE, common))


def _missing(path: str, found: str = METADATA_FILE) -> MetadataError:
    return MetadataError("a file of the checkpoint is missing", file=path, found=f"{found}, which was written with it", fix=_RESTORE)


def _whole_tensors(headers: Headers, directory: str, files: list[str]) -> Catalog:
    tensors: dict[TensorKey, StoredTensor] = {}
    owners: dict[str, str] = {}
    for file in files:
        kind = kind_of_file(file) or Kind.MODEL
        for name, entry in headers.get(file).entries.items():
            if name in owners:
                raise MetadataError(
                    f"two files hold a tensor of one name, and there is no {METADATA_FILE} to tell them apart",
                    file=directory,
                    tensor=name,
                    found=f"in {owners[name]} and in {file}",
                    fix="leave only one checkpoint's files in the directory",
                )
            if not is_tensor_name(name, kind):
                raise DataFileError("a name that no tensor has", file=join(directory, file), tensor=repr(name), fix=_RESTORE)
            owners[name] = file
            key = parse_tensor_name(name, kind)
            piece = Piece(Region.whole(entry.shape), (Site(file, 0),), (0,))
            tensors[key] = StoredTensor(key, name, Arrangement(entry.dtype, entry.shape, None, (piece,)))
    return Catalog(
        directory, tensors, (f"no {METADATA_FILE}: took every tensor of {len(files)} files as whole, as a single card saves them",)
    )


def _dtype_in(headers: Headers, place: Place, directory: str) -> DType:
    entry = headers.get(place.file).entries.get(place.name)
    if entry is None:
        raise DataFileError(
            "the metadata promises a tensor that the file doesn't hold", file=join(directory, place.file), tensor=place.name, fix=_RESTORE
        )
    return entry.dtype


def check_promises(catalog: Catalog, headers: Headers, files: Iterable[str] | None = None) -> tuple[str, ...]:
    """See that files hold what the catalog promises; reads headers only.

    Args:
        catalog: what is promised.
        headers: of the same directory.
        files: only these files; all that the catalog names by default.

    Returns:
        Notes about tensors that the files hold and the catalog doesn't name. They are ignored.

    Raises:
        DataFileError: a file is missing or damaged, or doesn't hold what was promised.
    """
    chosen = None if files is None else set(files)
    promised: dict[str, set[str]] = {}
    for tensor in catalog.tensors.values():
        for chunk in tensor.chunks:
            for place in chunk.places:
                if chosen is None or place.file in chosen:
                    headers.entry(place, tensor.dtype, chunk.region.shape)
                    promised.setdefault(place.file, set()).add(place.name)
    unlisted = {name for file, names in promised.items() for name in headers.get(file).entries if name not in names}
    if not unlisted:
        return ()
    some = sorted(unlisted)
    more = f" and {len(some) - 5} more" if len(some) > 5 else ""
    return (f"the files hold tensors that the metadata doesn't list; ignored: {', '.join(some[:5])}{more}",)
