"""A file of `torch.save` (`.pt`, `.pth`, `.bin`) becomes a catalog of whole tensors."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from reshard.catalog import Arrangement, Piece, Site
from reshard.errors import DataFileError
from reshard.sources.items import ItemTable
from reshard.sources.pytorch.assembly import StateDictionary, assemble
from reshard.sources.pytorch.naming import Path, Prefixes
from reshard.sources.pytorch.objects import MAX_DEPTH, TensorRef
from reshard.sources.pytorch.runs import Run, runs_of
from reshard.sources.pytorch.values import ValueReader, open_archive, place_of, value_or_problem
from reshard.sources.pytorch.zip_records import ZipRecords
from reshard.sources.stored import Stored
from reshard.storage import ReadableFile, Storage

_ZIP_START = b"PK\x03\x04"
_PICKLE_START = b"\x80"

# A state of 100,000 parameters has 3 tensors for each; the same dictionary twice in a file is not read without end.
_MOST_LEAVES = 4_000_000

Keyed = dict[str, Any]


def open_saved_file(storage: Storage, path: str, prefixes: Prefixes) -> Stored:
    """Open such a file: what it describes is read, of the tensors nothing.

    Args:
        storage: where it lies.
        path: the file.
        prefixes: where model and optimizer begin in it, as far as the caller says.

    Raises:
        DataFileError: it is no such file, of the format before PyTorch 1.6, or damaged; or it names what isn't taken from files.
        UsageError: it can't be told which part is the model's.
        StorageError: the storage refuses.
    """
    directory, name = posixpath.split(path)
    with storage.open_read(path) as file:
        _check_kind(_start_of(file), path)
        records, root = open_archive(file)
        leaves, paths = _flatten(root, path)
        tensors = {key: value for key, value in leaves.items() if type(value) is TensorRef}
        runs = {key: runs_of(tensor, key, path) for key, tensor in tensors.items()}
        places = {key: place_of(records, tensor) for key, tensor in tensors.items()}

        def read(keys: Sequence[str]) -> tuple[Keyed, dict[str, str]]:
            return _read_values(file, records, leaves, keys)

        known: dict[tuple[object, ...], Arrangement] = {}
        arrangements = {key: arrange(tensor, runs[key], name, known) for key, tensor in tensors.items()}
        storages = {key: (tensor.storage.key, tensor.offset, tensor.shape) for key, tensor in tensors.items()}
        others = [key for key in leaves if key not in tensors]
        made = assemble(StateDictionary(directory, path, arrangements, others, paths, read, storages), prefixes)
    rows = [row for number, key in enumerate(made.keys) for row in item_rows(number, runs[key], places[key])]
    return Stored(made.catalog, is_weights=made.is_weights, files=made.files, items=ItemTable.of("raw", {name: rows}))


class StoredTensorRef(NamedTuple):
    """A tensor in such a file.

    Attributes:
        tensor: as the file describes it.
        runs: that it consists of.
        begin: where its first byte is in the file.
    """

    tensor: TensorRef
    runs: tuple[Run, ...]
    begin: int


def read_tensors(storage: Storage, path: str) -> tuple[dict[str, StoredTensorRef], list[str]]:
    """The tensors of such a file by their keys, and the keys of what is no tensor.

    Args:
        storage: where it lies.
        path: the file.

    Raises:
        DataFileError: as `open_saved_file`.
        StorageError: the storage refuses.
    """
    with storage.open_read(path) as file:
        _check_kind(_start_of(file), path)
        records, root = open_archive(file)
        leaves, _ = _flatten(root, path)
        tensors = {key: value for key, value in leaves.items() if type(value) is TensorRef}
        found = {key: StoredTensorRef(one, runs_of(one, key, path), place_of(records, one)) for key, one in tensors.items()}
        return found, [key for key in leaves if key not in tensors]


def is_saved_file(storage: Storage, path: str) -> bool:
    """Whether a file begins as those of `torch.save` do, of today or of before PyTorch 1.6."""
    with storage.open_read(path) as file:
        start = _start_of(file)
    return start == _ZIP_START or start[:1] == _PICKLE_START


def _start_of(file: ReadableFile) -> bytes:
    start = bytearray(min(4, file.size))
    file.read_into(0, memoryview(start))
    return bytes(start)


def _check_kind(start: bytes, path: str) -> None:
    if start == _ZIP_START:
        return
    is_old = start[:1] == _PICKLE_START
    raise DataFileError(
        "a file of torch.save in the format before PyTorch 1.6" if is_old else "not a file that torch.save wrote",
        file=path,
        found="a pickle with the tensors behind it" if is_old else (repr(start) if start else "an empty file"),
        expected="a zip archive",
        fix="load it with torch.load(..., weights_only=True) and save it again with torch.save, which writes the new format"
        if is_old
        else "give a checkpoint's directory, or a file of torch.save",
    )


def _flatten(root: Any, path: str) -> tuple[Keyed, dict[str, Path]]:
    """The leaves of a nested dictionary by their paths joined by dots, as torch.distributed.checkpoint flattens one: a list without
    tensors and dictionaries is a leaf.
    """
    if type(root) is not dict:
        what = "a tensor" if type(root) is TensorRef else f"a {type(root).__name__}"
        raise DataFileError("a file that holds no state dictionary", file=path, found=what, expected="a dictionary of tensors by name")
    leaves: Keyed = {}
    paths: dict[str, Path] = {}
    for where, value in _leaves(root, (), path, [_MOST_LEAVES]):
        key = ".".join(map(str, where))
        if key in leaves:
            raise DataFileError("two values have the same path", file=path, tensor=key, fix="rename one of them")
        leaves[key] = value
        paths[key] = where
    return leaves, paths


def _leaves(value: Any, where: Path, path: str, left: list[int]) -> Iterator[tuple[Path, Any]]:
    left[0] -= 1
    if len(where) > MAX_DEPTH or left[0] < 0:
        raise DataFileError("values that are nested too deeply, or repeat without end", file=path, found=f"at {where[:3]}")
    if type(value) is dict and value:
        for key, item in value.items():
            part = key if type(key) in (str, int) else str(key) if type(key) in (bool, float, bytes) else type(key).__name__
            yield from _leaves(item, (*where, part), path, left)
    elif type(value) in (list, tuple) and any(type(item) in (dict, TensorRef) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*where, index), path, left)
    else:
        yield where, value


def arrange(tensor: TensorRef, runs: tuple[Run, ...], file: str, known: dict[tuple[object, ...], Arrangement]) -> Arrangement:
    """How a tensor of a file lies in it; `known` has those that lie alike, and gets this one."""
    alike = (tensor.dtype.name, tensor.shape, len(runs), runs[0].region.shape, file)
    found = known.get(alike)
    if found is None:
        # Several runs are as many tensors, with names of their own.
        pieces = (Piece(run.region, (Site(file, 0, f" (run {number})" if number else ""),), (0,)) for number, run in enumerate(runs))
        found = known[alike] = Arrangement(tensor.dtype, tensor.shape, None, tuple(pieces))
    return found


def item_rows(number: int, runs: tuple[Run, ...], begin: int) -> Iterator[tuple[int, int, int, int]]:
    """The rows of a table of items for a tensor.

    Args:
        number: of the tensor in the catalog's order.
        runs: that it consists of.
        begin: where its first byte is in the file.
    """
    for piece, run in enumerate(runs):
        yield number, piece, begin + run.begin, run.nbytes


def _read_values(file: ReadableFile, records: ZipRecords, leaves: Mapping[str, Any], keys: Sequence[str]) -> tuple[Keyed, dict[str, str]]:
    values: Keyed = {}
    problems: dict[str, str] = {}
    for key in keys:
        value, problem = value_or_problem(lambda leaf=leaves[key]: ValueReader(file, records).read(leaf))
        if problem is None:
            values[key] = value
        else:
            problems[key] = problem
    return values, problems
