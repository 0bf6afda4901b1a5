"""Directories of ranks (`rank_0`, `rank_1`, …), and which of their files were saved together."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from reshard.errors import CheckpointNotFoundError, DataFileError, UsageError
from reshard.format.names import COMMON_FILE, DATA_SUFFIX, METADATA_FILE, kind_of_file
from reshard.sources.huggingface import CONFIG_FILE
from reshard.sources.legacy.naming import some
from reshard.storage import Entry, Storage
from reshard.storage.storage import join

CKPT_SUFFIX = ".ckpt"
SUFFIXES = (CKPT_SUFFIX, DATA_SUFFIX)

_RANK = re.compile(r"rank_(\d{1,6})", re.ASCII)
# `{prefix}-{epoch}_{step}`: what MindSpore's callbacks name files.
_NUMBERED = re.compile(r".*-(\d{1,15})_(\d{1,15})\.\w+", re.ASCII | re.DOTALL)
# The rank in a file's own name, as MindSpore Transformers writes it.
_OWN_RANK = re.compile(r"rank_\d+", re.ASCII)

_SAVES_SHOWN = 4

# What makes a directory a folder of Hugging Face weights.
_WEIGHTS_INDEX = "model.safetensors.index.json"
_WEIGHTS_FILE = "model.safetensors"


class Save(NamedTuple):
    """Which save of a run a file belongs to.

    Attributes:
        epoch: as its name says; -1 where it doesn't.
        step: likewise, the step in the epoch or of the run.
        name: the name without its rank, where it has no numbers.
    """

    epoch: int
    step: int
    name: str

    def __str__(self) -> str:
        return self.name or f"epoch {self.epoch}, step {self.step}"


class Chosen(NamedTuple):
    """The files of one save.

    Attributes:
        files: by rank, relative to the directory.
        save: which it is.
        notes: what the reader should know about the choice.
    """

    files: Mapping[int, str]
    save: Save
    notes: tuple[str, ...] = ()


def rank_of(name: str) -> int | None:
    """The rank of a directory, by its name; None when it is no rank's."""
    match = _RANK.fullmatch(name)
    return int(match[1]) if match is not None and name == f"rank_{int(match[1])}" else None


def save_of(name: str) -> Save:
    """Which save a file belongs to, by its name."""
    match = _NUMBERED.fullmatch(name)
    return Save(-1, -1, _OWN_RANK.sub("rank_*", name)) if match is None else Save(int(match[1]), int(match[2]), "")


def is_file_of_legacy(name: str) -> bool:
    """Whether a file can be one of Checkpoint 1.0, by its name."""
    return name.endswith(SUFFIXES) and kind_of_file(name) is None


def is_legacy_directory(storage: Storage, path: str, entries: Sequence[Entry]) -> bool:
    """Whether a directory has such files: in directories of ranks, or as the directory of a rank.

    Args:
        storage: where it lies.
        path: the directory.
        entries: what it holds.

    Raises:
        StorageError: a rank's directory can't be listed.
    """
    names = _files_in(entries)
    if METADATA_FILE in names or COMMON_FILE in names:
        return False
    if rank_of(posixpath.basename(path)) is not None and _has_files(names):
        return True
    ranks = [entry.name for entry in entries if entry.is_directory and rank_of(entry.name) is not None]
    return any(_has_files(_files_in(storage.list(join(path, name)))) for name in ranks)


def _files_in(entries: Sequence[Entry]) -> set[str]:
    return {entry.name for entry in entries if not entry.is_directory}


def _has_files(names: Collection[str]) -> bool:
    """Whether a rank's directory has files of Checkpoint 1.0: it may be a folder of Hugging Face weights that a rank wrote."""
    if _WEIGHTS_INDEX in names or {_WEIGHTS_FILE, CONFIG_FILE} <= set(names):
        return False
    return any(is_file_of_legacy(name) for name in names)


def list_ranks(storage: Storage, directory: str) -> dict[int, list[str]]:
    """The files of every rank's directory that has any, by rank.

    Raises:
        StorageError: a directory can't be listed.
    """
    found: dict[int, list[str]] = {}
    for entry in storage.list(directory):
        rank = rank_of(entry.name)
        if rank is not None and entry.is_directory:
            files = [file.name for file in storage.list(join(directory, entry.name)) if not file.is_directory]
            own = [name for name in files if is_file_of_legacy(name)] if _has_files(files) else []
            if own:
                found[rank] = own
    return dict(sorted(found.items()))


def choose_files(storage: Storage, directory: str, named: str | None = None) -> Chosen:
    """The files that all ranks saved together: the newest such, or those of a name.

    Args:
        storage: where they lie.
        directory: that of the ranks' directories.
        named: the name of one rank's file; None for the newest that every rank has.

    Raises:
        CheckpointNotFoundError: there are no ranks' files.
        DataFileError: no save is whole; or the one that was asked for isn't.
        UsageError: which save is meant can't be known.
        StorageError: a directory can't be listed.
    """
    listed = list_ranks(storage, directory)
    if not listed:
        raise CheckpointNotFoundError("there are no files of ranks", file=directory, expected="rank_0/….ckpt or rank_0/….safetensors")
    suffixes = {posixpath.splitext(name)[1] for names in listed.values() for name in names}
    if named is None and len(suffixes) > 1:
        raise UsageError(
            "files of both kinds lie in the ranks' directories",
            file=directory,
            found=" and ".join(sorted(suffixes)),
            fix="give the path of one rank's file: that save of all ranks is read",
        )
    saves: dict[Save, dict[int, str]] = {}
    for rank, names in listed.items():
        for name in names:
            if named is not None and not name.endswith(posixpath.splitext(named)[1]):
                continue
            files = saves.setdefault(save_of(name), {})
            if rank in files:
                raise UsageError(
                    "two files of a rank have the same epoch and step",
                    file=join(directory, f"rank_{rank}"),
                    rank=rank,
                    found=f"{files[rank]} and {name}",
                    fix="move the files of one of the runs elsewhere",
                )
            files[rank] = name
    if named is not None:
        chosen = save_of(named)
        return Chosen(_paths(saves[_whole_one(saves, chosen, listed, directory)], directory), chosen)
    whole = [save for save, files in saves.items() if len(files) == len(listed)]
    if not whole:
        raise DataFileError(
            "no save has the files of all ranks",
            file=directory,
            found="; ".join(f"{save}: ranks {some(list(files))}" for save, files in sorted(saves.items())[-_SAVES_SHOWN:]),
            expected=f"one that has ranks {some(list(listed))}",
            fix="fetch the missing files; or move away the directories of ranks that are not part of the run",
        )
    if len(whole) > 1 and any(save.name for save in whole):
        raise UsageError(
            "several saves lie in the ranks' directories, and their names don't say which is the newest",
            file=directory,
            found=some([str(save) for save in sorted(whole)]),
            expected="names that end in -{epoch}_{step}",
            fix="give the path of one rank's file: that save of all ranks is read",
        )
    newest = max(whole)
    notes: list[str] = []
    if len(whole) > 1:
        notes.append(f"took {newest}, the newest of {len(whole)} saves that all ranks have")
    torn = [save for save in saves if save > newest and not save.name]
    if torn:
        notes.append(f"newer saves lack files of some ranks and were left out: {some([str(save) for save in sorted(torn)])}")
    return Chosen(_paths(saves[newest], directory), newest, tuple(notes))


def _whole_one(saves: Mapping[Save, Mapping[int, str]], save: Save, listed: Mapping[int, Sequence[str]], directory: str) -> Save:
    missing = [rank for rank in listed if rank not in saves.get(save, {})]
    if missing:
        raise DataFileError(
            "a save lacks the files of some ranks",
            file=directory,
            found=f"no file of {save} of ranks {some(missing)}",
            expected=f"one of each of ranks {some(list(listed))}",
            fix="fetch the missing files; or move away the directories of ranks that are not part of the run",
        )
    return save


def _paths(files: Mapping[int, str], directory: str) -> dict[int, str]:
    """The files of one save, relative to the directory.

    Raises:
        UsageError: they are of runs with different names.
    """
    first = min(files)
    for rank, name in files.items():
        if _OWN_RANK.sub("rank_*", name) != _OWN_RANK.sub("rank_*", files[first]):
            raise UsageError(
                "the files of a save have different names, as those of different runs have",
                file=join(directory, f"rank_{rank}", name),
                rank=rank,
                found=name,
                expected=f"{files[first]}, as of rank {first}, but for the rank",
                fix="move the files of the other run elsewhere",
            )
    return {rank: join(f"rank_{rank}", name) for rank, name in files.items()}
