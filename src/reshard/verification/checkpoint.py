"""Verify a checkpoint, or all that lie in a root."""

from __future__ import annotations

import os
import posixpath
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from reshard.catalog import Catalog, Place
from reshard.errors import CheckpointNotFoundError, DamagedCheckpointError, MetadataError, StorageError, TrackerError, UsageError
from reshard.format.common import read_common
from reshard.format.index import INDEX_FILE
from reshard.format.metadata import MOST_METADATA_BYTES, SEALED_SINCE, decode_metadata
from reshard.format.names import (
    COMMON_FILE,
    DATA_SUFFIX,
    EXTRA_DIRECTORY,
    GLOBAL_EXTRA_FILE,
    METADATA_FILE,
    TRACKER_FILE,
    parse_iteration_name,
)
from reshard.format.safetensors import Header
from reshard.format.seal import SEAL_FILE, Seal, read_seal
from reshard.format.small_file import read_small
from reshard.geometry import DType
from reshard.sources.native import check_links, open_catalog
from reshard.sources.opening import is_foreign
from reshard.sources.resolve import list_iterations, resolve
from reshard.storage import PosixStorage, Storage
from reshard.storage.storage import join
from reshard.verification.faults import Fault, RootVerification, Verification
from reshard.verification.files import FileCheck

T = TypeVar("T")

# Files that are read at a time: a parallel file system wants several, and more than the cores that hash are of little use on any.
READERS = min(8, 2 * (os.cpu_count() or 1))

Progress = Callable[[int, int], None]
"""Is told of the bytes that are done and of all bytes: from any thread, one call at a time."""

# A note names so many files or tensors.
_NAMES_SHOWN = 5

_INDEX = join(EXTRA_DIRECTORY, INDEX_FILE)
_GLOBAL_EXTRA = join(EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE)


def verify(
    path: str | os.PathLike[str], *, storage: Storage | None = None, readers: int = READERS, progress: Progress | None = None
) -> Verification:
    """Read a checkpoint whole, and name every fault in it. Changes nothing, and needs no framework.

    Args:
        path: a checkpoint root (its tracker is obeyed), or the directory of one checkpoint.
        storage: where it lies; the file system by default.
        readers: how many files are read at a time.
        progress: is told how far it is.

    Raises:
        CheckpointNotFoundError: there is no checkpoint.
        TrackerError: the root's tracker is damaged.
        UsageError: it is a checkpoint of PyTorch or of MindSpore's Checkpoint 1.0, which have no digests.
        StorageError: the directory can't be listed.
    """
    storage = PosixStorage() if storage is None else storage
    found = resolve(storage, os.path.abspath(os.fspath(path)))
    if is_foreign(storage, found.directory):
        raise UsageError(
            "a checkpoint of PyTorch or of MindSpore's Checkpoint 1.0 can't be verified: nothing in it says which bytes it must have",
            file=found.directory,
            fix="`reshard show` looks whether its files hold what its metadata promises; `reshard convert` adds digests",
        )
    there = storage.stat(found.directory)
    if there is not None and not there.is_directory:
        raise CheckpointNotFoundError("a file that is no checkpoint", file=found.directory, fix="give a checkpoint root or an iteration")
    return _Verifier(storage, found.directory, readers, progress).run(found.iteration, found.notes)


def verify_all(
    root: str | os.PathLike[str], *, storage: Storage | None = None, readers: int = READERS, progress: Progress | None = None
) -> RootVerification:
    """Verify every iteration of a root, and its tracker. What a run removes meanwhile is left out.

    Args:
        root: the checkpoint root.
        storage: as in `verify`.
        readers: likewise.
        progress: likewise; it begins anew with every iteration.

    Raises:
        CheckpointNotFoundError: there is no iteration.
        StorageError: a directory can't be listed.
    """
    storage = PosixStorage() if storage is None else storage
    path = posixpath.normpath(os.path.abspath(os.fspath(root)))
    there = storage.stat(path)
    if there is None or not there.is_directory:
        raise CheckpointNotFoundError("there is no such checkpoint root", file=path, fix="give the directory that a run saves to")
    directories = dict(list_iterations(storage, path))
    for entry in storage.list(path):
        step = parse_iteration_name(entry.name)
        if step is not None and entry.is_directory:
            # Also what no load takes for a checkpoint: it may have been one before it lost its metadata.
            directories.setdefault(step, join(path, entry.name))
    if not directories:
        raise CheckpointNotFoundError("there is no iteration in this directory", file=path, fix="give the directory that a run saves to")
    found = [_unless_gone(storage, directory, step, readers, progress) for step, directory in sorted(directories.items())]
    return RootVerification(path, _tracker_fault(storage, path), tuple(one for one in found if one is not None))


def _unless_gone(storage: Storage, directory: str, step: int, readers: int, progress: Progress | None) -> Verification | None:
    result = None
    try:
        result = _Verifier(storage, directory, readers, progress).run(step)
    except StorageError:
        if storage.stat(directory) is not None:
            raise
    return result if storage.stat(directory) is not None else None


def _tracker_fault(storage: Storage, root: str) -> Fault | None:
    try:
        resolve(storage, root)
    except TrackerError as error:
        return Fault.of(TRACKER_FILE, error)
    except CheckpointNotFoundError:
        return None
    return None


class _Verifier:
    """The work on one checkpoint."""

    def __init__(self, storage: Storage, directory: str, readers: int, progress: Progress | None) -> None:
        self._storage = storage
        self._directory = directory
        self._readers = readers
        self._progress = progress
        self._guard = threading.Lock()
        self._done = 0
        self._faults: list[Fault] = []
        self._notes: list[str] = []

    def run(self, iteration: int | None, notes: Sequence[str] = ()) -> Verification:
        started = time.perf_counter()
        if self._attempt(self._directory, lambda: check_links(self._storage, self._directory)) is None and self._faults:
            return Verification(self._directory, iteration, False, 0, 0, tuple(self._faults), (*notes,), time.perf_counter() - started)
        sizes = self._list()
        seal = self._attempt(SEAL_FILE, lambda: read_seal(self._storage, self._directory))
        checks = self._read(sizes, seal)
        headers = {check.name: check.header for check in checks if check.header is not None}
        if seal is None:
            self._attempt(COMMON_FILE, lambda: read_common(self._storage, join(self._directory, COMMON_FILE)))
        catalog = self._catalog(sizes, seal, headers)
        if catalog is not None:
            self._hold_to_promises(catalog, headers, sizes)
        if seal is None:
            self._do_without_seal(catalog, headers, sizes)
        looked_at = {check.name for check in checks} | {SEAL_FILE, METADATA_FILE, COMMON_FILE}
        return Verification(
            directory=self._directory,
            iteration=iteration,
            is_sealed=seal is not None,
            files=len(looked_at & sizes.keys()),
            nbytes=sum(check.nbytes for check in checks) + (0 if seal is None else sizes[SEAL_FILE]),
            faults=tuple(sorted(self._faults, key=lambda fault: fault.file)),
            notes=(*notes, *self._notes),
            seconds=time.perf_counter() - started,
        )

    def _list(self) -> dict[str, int]:
        """The files of the checkpoint's directory and of its extras, and their sizes."""
        sizes = {}
        has_extras = False
        for entry in self._storage.list(self._directory):
            if not entry.is_directory:
                sizes[entry.name] = entry.size
            elif entry.name == EXTRA_DIRECTORY:
                has_extras = True
        if has_extras:
            extras = self._storage.list(join(self._directory, EXTRA_DIRECTORY))
            sizes.update((join(EXTRA_DIRECTORY, entry.name), entry.size) for entry in extras if not entry.is_directory)
        return sizes

    def _attempt(self, file: str, work: Callable[[], T]) -> T | None:
        """The result of some work on a file, or None and a fault."""
        try:
            return work()
        except (DamagedCheckpointError, StorageError) as error:
            where = file if error.file is None else error.file.removeprefix(f"{self._directory}/")
            # What already is known to be damaged need not make sense: once said is enough.
            if not any(fault.file == where for fault in self._faults):
                self._faults.append(Fault.of(where, error))
            return None

    def _missing(self, name: str) -> None:
        self._faults.append(Fault(name, "a file of the checkpoint is missing"))

    def _note(self, what: str, names: Collection[str]) -> None:
        if names:
            some = ", ".join(sorted(names)[:_NAMES_SHOWN])
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            self._notes.append(f"{what}: {some}{more}")

    def _read(self, sizes: Mapping[str, int], seal: Seal | None) -> list[FileCheck]:
        """Read all files whole: those that the seal lists; without a seal those of tensors."""
        listed = seal.files if seal is not None else dict.fromkeys(name for name in sizes if name.endswith(DATA_SUFFIX))
        total = sum(sizes[name] for name in listed if name in sizes)

        def advance(nbytes: int) -> None:
            with self._guard:
                self._done += nbytes
                if self._progress is not None:
                    self._progress(self._done, total)

        checks = []
        for name, sealed in listed.items():
            if name in sizes:
                checks.append(FileCheck(self._storage, self._directory, name, sealed, advance))
            elif name == _INDEX:
                self._notes.append(f"no {_INDEX}: it is made anew when the checkpoint is loaded")
            else:
                self._missing(name)
        # The largest first, so that the last reader isn't left alone with one of them.
        checks.sort(key=lambda check: -sizes[check.name])
        with ThreadPoolExecutor(self._readers, "reshard-verify") as pool:
            for _ in pool.map(_check, checks):
                pass
        for check in checks:
            self._faults += check.faults
        if seal is not None:
            self._note(
                "files that the seal doesn't list; they are none of the checkpoint's", sizes.keys() - seal.files.keys() - {SEAL_FILE}
            )
        return checks

    def _catalog(self, sizes: Mapping[str, int], seal: Seal | None, headers: Mapping[str, Header]) -> Catalog | None:
        path = join(self._directory, METADATA_FILE)

        def dtype_of(place: Place) -> DType:
            entry = headers[place.file].entries.get(place.name) if place.file in headers else None
            if entry is None:
                raise MetadataError("an element type that neither the metadata nor a file tells", file=path, tensor=place.name)
            return entry.dtype

        if any(fault.file == METADATA_FILE for fault in self._faults):
            # What damaged metadata promises says nothing of the files.
            return None
        if METADATA_FILE in sizes:

            def decode() -> Catalog:
                return decode_metadata(read_small(self._storage, path, MOST_METADATA_BYTES, error=MetadataError), path, dtype_of)

            return self._attempt(METADATA_FILE, decode)
        # A single card's checkpoint may have none.
        return self._attempt(METADATA_FILE, lambda: open_catalog(self._storage, self._directory)) if seal is None else None

    def _hold_to_promises(self, catalog: Catalog, headers: Mapping[str, Header], sizes: Mapping[str, int]) -> None:
        """See that the files hold what the catalog says."""
        missing: set[str] = set()
        unlisted = {name: set(header.entries) for name, header in headers.items() if "/" not in name}
        for tensor in catalog.tensors.values():
            for piece in tensor.arrangement.pieces:
                for site in piece.sites:
                    header = headers.get(site.file)
                    if header is None:
                        if site.file not in sizes:
                            missing.add(site.file)
                        continue
                    name = tensor.name + site.suffix
                    unlisted[site.file].discard(name)
                    self._hold_to_promise(site.file, name, header, tensor.dtype, piece.region.shape)
        known = {fault.file for fault in self._faults}
        for name in sorted(missing - known):
            self._missing(name)
        self._note("the files hold tensors that the metadata doesn't list; ignored", set().union(*unlisted.values()))

    def _hold_to_promise(self, file: str, name: str, header: Header, dtype: DType, shape: tuple[int, ...]) -> None:
        entry = header.entries.get(name)
        if entry is None:
            self._faults.append(Fault(file, "the metadata promises a tensor that the file doesn't hold", name))
        elif entry.shape != shape or entry.dtype != dtype:
            found, expected = f"{entry.dtype} of shape {list(entry.shape)}", f"{dtype} of shape {list(shape)}"
            self._faults.append(Fault(file, "a tensor in a file is not what the metadata promises", name, found, expected))

    def _do_without_seal(self, catalog: Catalog | None, headers: Mapping[str, Header], sizes: Mapping[str, int]) -> None:
        """What can be said of a checkpoint that has no seal, or a damaged one."""
        version = None if catalog is None else catalog.format_version
        if version is not None:
            for name in (COMMON_FILE, _GLOBAL_EXTRA):
                if name not in sizes:
                    self._missing(name)
        if SEAL_FILE in sizes:
            return
        if version is not None and version >= SEALED_SINCE:
            self._missing(SEAL_FILE)
        has_digests = any(entry.digests for header in headers.values() for entry in header.entries.values())
        what = "metadata and headers are" if has_digests else "its bytes are"
        self._notes.append(f"no {SEAL_FILE}{'' if has_digests else ' and no digests'}: whether {what} as they were saved can't be known")


def _check(check: FileCheck) -> None:
    if check.name.endswith(DATA_SUFFIX):
        check.read_tensors()
    else:
        check.read_bytes()
