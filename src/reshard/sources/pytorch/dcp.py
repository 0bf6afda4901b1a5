"""A checkpoint of torch.distributed.checkpoint (a directory with `.metadata` and `.distcp` files) becomes a catalog.

By default each part of a tensor is what `torch.save` wrote of it, at an offset of a file. Its bytes lie in there as they are, so that a
load reads them straight into their places. Source: `torch/distributed/checkpoint/filesystem.py`, PyTorch 2.2 to 2.13.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from reshard.catalog import Arrangement, Piece, Site, StoredTensor
from reshard.errors import DataFileError, MetadataError
from reshard.geometry.cover import cover_fault
from reshard.sources.items import ItemTable
from reshard.sources.pytorch.assembly import StateDictionary, assemble
from reshard.sources.pytorch.dcp_metadata import DCP_METADATA_FILE, DcpMetadata, DcpTensor, Item, read_dcp_metadata
from reshard.sources.pytorch.naming import Prefixes
from reshard.sources.pytorch.values import ValueReader, open_archive, value_or_problem
from reshard.sources.stored import Stored
from reshard.storage import ReadableFile, Storage
from reshard.storage.storage import join

# `__3_0.distcp`: the rank that wrote it, and which of its files it is.
_RANK_FILE = re.compile(r"__(\d{1,9})_\d{1,9}\.distcp", re.ASCII)

_NAMES_SHOWN = 4


def is_dcp(names: Collection[str]) -> bool:
    """Whether a directory is such a checkpoint, by the names of its files."""
    return DCP_METADATA_FILE in names


def open_dcp(storage: Storage, directory: str, prefixes: Prefixes) -> Stored:
    """Open such a checkpoint: its metadata, hyper-parameters, step counts and other small values are read, of the tensors nothing.

    Args:
        storage: where it lies.
        directory: its directory.
        prefixes: where model and optimizer begin in the keys, as far as the caller says.

    Raises:
        MetadataError: the metadata is damaged, or names what isn't taken from files; parts of a tensor don't make up the whole.
        DataFileError: a file is missing or damaged that is needed to know the checkpoint.
        UsageError: it can't be told which part is the model's.
        StorageError: the storage refuses.
    """
    metadata = read_dcp_metadata(storage, directory)
    path = join(directory, DCP_METADATA_FILE)
    arrangements, foreign = _arrangements(metadata.tensors, path)
    notes = ()
    if foreign:
        more = len(foreign) - _NAMES_SHOWN
        listed = ", ".join(foreign[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        notes = (f"tensors of element types that checkpoints don't hold were left out: {listed}",)
    rows = dict(metadata.values)
    state = StateDictionary(
        directory,
        path,
        arrangements,
        list(metadata.values),
        metadata.paths,
        lambda keys: _read_values(storage, directory, {key: rows.get(key) or metadata.tensors[key].chunks[0][1] for key in keys}),
        notes=notes,
    )
    made = assemble(state, prefixes)
    items = _table(made.keys, list(made.catalog.tensors.values()), metadata)
    return Stored(made.catalog, is_weights=made.is_weights, files=made.files, items=items)


def _arrangements(tensors: Mapping[str, DcpTensor], path: str) -> tuple[dict[str, Arrangement], list[str]]:
    """How the tensors lie, those that lie alike sharing one arrangement; and those of types that nobody here knows."""
    known: dict[tuple[object, ...], Arrangement] = {}
    found: dict[str, Arrangement] = {}
    foreign: list[str] = []
    for key, tensor in tensors.items():
        if tensor.dtype is None:
            foreign.append(f"{key} ({tensor.dtype_name})")
            continue
        alike = (tensor.dtype.name, tensor.shape, tuple((region, item.file) for region, item in tensor.chunks))
        arrangement = known.get(alike)
        if arrangement is None:
            arrangement = known[alike] = _arrange(key, tensor, path)
        found[key] = arrangement
    return found, foreign


def _arrange(key: str, tensor: DcpTensor, path: str) -> Arrangement:
    regions = [region for region, _ in tensor.chunks]
    fits = all(len(region.shape) == len(tensor.shape) for region in regions)
    fault = cover_fault(regions, tensor.shape) if fits else "parts of another number of dimensions"
    if fault is not None:
        raise MetadataError(
            "the parts of a tensor don't cover it exactly once",
            file=path,
            tensor=key,
            found=fault,
            expected=f"a tensor of {list(tensor.shape)}",
            fix="the metadata is damaged: restore it from a copy",
        )
    assert tensor.dtype is not None  # the caller leaves those out
    # Several parts in one file have names of their own, as everywhere.
    seen = Counter[str]()
    pieces = []
    for region, item in tensor.chunks:
        match = _RANK_FILE.fullmatch(item.file)
        number = seen[item.file]
        seen[item.file] += 1
        site = Site(item.file, 0 if match is None else int(match[1]), f"@{number}" if number else "")
        pieces.append(Piece(region, (site,)))
    return Arrangement(tensor.dtype, tensor.shape, None, tuple(pieces))


def _read_values(storage: Storage, directory: str, items: Mapping[str, Item]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values, and why others can't be had. What is read lies close together, file by file."""
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    by_file: dict[str, list[str]] = {}
    for key, item in items.items():
        by_file.setdefault(item.file, []).append(key)
    for name, keys in by_file.items():
        path = join(directory, name)
        if storage.stat(path) is None:
            raise DataFileError("a data file is missing", file=path, tensor=keys[0], fix="restore it from a copy")
        with storage.open_read(path) as file:
            for key in sorted(keys, key=lambda key: items[key].begin):
                value, problem = value_or_problem(lambda item=items[key], file=file: _read_value(file, item))
                if problem is None:
                    values[key] = value
                else:
                    problems[key] = problem
    # In the order of the checkpoint, whatever the files'.
    return {key: values[key] for key in items if key in values}, problems


def _read_value(file: ReadableFile, item: Item) -> Any:
    records, value = open_archive(file, item.begin, item.nbytes)
    return ValueReader(file, records).read(value)


def _table(keys: Sequence[str], tensors: Sequence[StoredTensor], metadata: DcpMetadata) -> ItemTable:
    rows: dict[str, list[tuple[int, int, int, int]]] = {}
    for number, key in enumerate(keys):
        for piece, (_, item) in enumerate(metadata.tensors[key].chunks):
            rows.setdefault(item.file, []).append((number, piece, item.begin, item.nbytes))
    return ItemTable.of("archive", rows)
