"""Checkpoint 1.0 as files: which of them belong together, and what each holds."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence

from reshard.errors import CheckpointNotFoundError, DataFileError, UsageError
from reshard.format.names import DATA_SUFFIX, kind_of_file
from reshard.format.safetensors import read_header
from reshard.geometry import Region
from reshard.sources.legacy.assembly import assemble
from reshard.sources.legacy.ckpt import FIRST_BYTE, cipher_of, read_ckpt
from reshard.sources.legacy.naming import some
from reshard.sources.legacy.ranks import Save, choose_files, list_ranks, rank_of, save_of
from reshard.sources.legacy.saved_file import FileTensor, Part, SavedFile
from reshard.sources.legacy.strategy import Strategy
from reshard.sources.stored import Stored
from reshard.storage import Storage
from reshard.storage.storage import join

# A file of several, as Hugging Face numbers them.
_NUMBER_OF = re.compile(r"-\d+-of-\d+\.", re.ASCII)

# MindSpore's own mark in a header, for numbers of four bits that are stored as bytes.
_QUARTER = "Int4"


def is_legacy_file(storage: Storage, path: str) -> bool:
    """Whether a file is one of Checkpoint 1.0, by its name and how it begins.

    Raises:
        StorageError: the storage refuses.
    """
    if path.endswith(DATA_SUFFIX):
        return True
    start = _start_of(storage, path)
    return start[:1] == FIRST_BYTE or cipher_of(start) is not None


def open_legacy(storage: Storage, path: str, strategy: Strategy | None) -> Stored:
    """Open such a checkpoint: names and shapes are read, and a run's counters, of the tensors nothing.

    Args:
        storage: where it lies.
        path: a file, which is all of it, or of one rank of several; or the directory of the ranks' directories.
        strategy: of the run that saved it; None where one rank has all.

    Raises:
        CheckpointNotFoundError: the file is a part of another kind of checkpoint.
        DataFileError: a file is missing, damaged or encrypted, or a part of a tensor is in no file.
        MetadataError: files and strategy don't fit together.
        LayoutError: the strategy contradicts itself.
        UsageError: there are several ranks, and no strategy; or which save is meant can't be known.
        StorageError: the storage refuses.
    """
    directory, files, save, notes = _files_of(storage, path)
    if strategy is None and len(files) > 1:
        raise _no_strategy(storage, directory, sorted(files))
    read = [_read_file(storage, directory, file, rank) for rank, file in files.items()]
    return assemble(storage, directory, read, strategy, None if save is None or save.name else save.step, notes)


def path_of_legacy(storage: Storage, path: str) -> str:
    """What to open where Checkpoint 1.0 is meant: the path itself, or the newest save of the ranks' directories in it, whatever else there
    is.

    Raises:
        ReshardError: as `choose_files`.
    """
    there = storage.stat(path)
    if there is None or not there.is_directory or not list_ranks(storage, path):
        return path
    return join(path, next(iter(choose_files(storage, path).files.values())))


def _files_of(storage: Storage, path: str) -> tuple[str, Mapping[int, str], Save | None, tuple[str, ...]]:
    """The directory of a checkpoint, its files by rank, which save they are, and what the reader should know of the choice."""
    there = storage.stat(path)
    is_file = there is not None and not there.is_directory
    own = posixpath.dirname(path) if is_file else path
    if rank_of(posixpath.basename(own)) is not None:
        # Whoever names one rank's file means what all ranks saved together.
        chosen = choose_files(storage, posixpath.dirname(own), posixpath.basename(path) if is_file else None)
        return posixpath.dirname(own), chosen.files, chosen.save, chosen.notes
    if not is_file:
        chosen = choose_files(storage, path)
        return path, chosen.files, chosen.save, chosen.notes
    name = posixpath.basename(path)
    if kind_of_file(name) is not None or _NUMBER_OF.search(name) is not None:
        raise CheckpointNotFoundError(
            "a checkpoint is a directory, and this is a file of one", file=path, fix="give the directory that it lies in"
        )
    return own, {0: name}, save_of(name), ()


def _no_strategy(storage: Storage, directory: str, ranks: Sequence[int]) -> UsageError:
    beside = join(posixpath.dirname(directory), "strategy")
    hint = f" (such as {beside}, if it is of this run)" if storage.stat(beside) is not None else ""
    return UsageError(
        "a checkpoint of several ranks doesn't say by itself which part of a tensor each has",
        file=directory,
        found=f"files of {len(ranks)} ranks, {some(ranks)}",
        expected=f"the strategy files of the run that saved it{hint}, or a table of layouts",
        fix="give them: reshard.SavedUnder(path, strategy) in Python, src_strategy_path_or_dir with use_legacy_format: True in YAML, "
        '--strategy on the command line; {"*": null} is the table of ranks that each have all of it',
    )


def _read_file(storage: Storage, directory: str, file: str, rank: int) -> SavedFile:
    path = join(directory, file)
    there = storage.stat(path)
    if there is None or there.is_directory:
        raise DataFileError("a data file is missing", file=path, rank=rank, fix="restore it from a copy")
    if file.endswith(DATA_SUFFIX):
        header = read_header(storage, path)
        left_out = tuple(f"{name} ({_QUARTER})" for name in header.entries if header.metadata.get(name) == _QUARTER)
        tensors = {
            entry.name: FileTensor(entry.dtype, entry.shape, (Part(Region.whole(entry.shape), entry.begin),))
            for entry in header.entries.values()
            if header.metadata.get(entry.name) != _QUARTER
        }
        return SavedFile(file, rank, tensors, left_out=left_out)
    cipher = cipher_of(_start_of(storage, path))
    if cipher is not None:
        raise DataFileError(
            "the file is encrypted, and only its key can read it",
            file=path,
            rank=rank,
            found=f"a file of mindspore.save_checkpoint(..., enc_key=…, enc_mode={cipher!r})",
            fix="load it with mindspore.load_checkpoint(path, dec_key=…) and save it again without a key",
        )
    with storage.open_read(path) as opened:
        return read_ckpt(opened, file, rank)


def _start_of(storage: Storage, path: str) -> bytes:
    with storage.open_read(path) as file:
        start = bytearray(min(4, file.size))
        file.read_into(0, memoryview(start))
    return bytes(start)
