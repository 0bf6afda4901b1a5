"""Weights that the ranks of torch.distributed.checkpoint wrote each for itself, as safetensors files without an index.

That is `HuggingFaceStorageWriter(save_distributed=True)`: a file has parts of tensors, and its header says where in them each part lies.
Source: `torch/distributed/checkpoint/hf_storage.py` and `filesystem.py`, PyTorch 2.8 to 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Annotated

import msgspec

from reshard.catalog import Arrangement, Piece, Site, StoredTensor
from reshard.errors import DataFileError, MetadataError
from reshard.format import json_text
from reshard.geometry import Region
from reshard.geometry.cover import cover_fault
from reshard.sources.stored import Headers
from reshard.state import TensorKey, model_key
from reshard.storage.storage import join

# Under this name a header says where its parts lie.
_OFFSETS = "DCP_SHARDING_INFO"

# `shard-00003-model-00001-of-00002.safetensors`: the third rank's part of the first of two files.
_SHARD_OF_RANK = re.compile(r"shard-(\d{1,9})-model-\d{1,9}-of-\d{1,9}\.safetensors", re.ASCII)

_FETCH = "a file is missing or of another checkpoint: fetch the folder again, whole"

# No tensor has more elements than this.
_Offset = Annotated[int, msgspec.Meta(ge=0, le=2**60)]


class _Place(msgspec.Struct):
    saved_offsets: list[_Offset]


_DECODER = msgspec.json.Decoder(dict[str, _Place])


def is_sharded(names: Collection[str]) -> bool:
    """Whether files are such parts, by their names."""
    return any(_SHARD_OF_RANK.fullmatch(name) for name in names)


def sharded_tensors(directory: str, files: Collection[str], headers: Headers) -> dict[TensorKey, StoredTensor]:
    """The tensors that the files make up. Their headers are read, of their data nothing.

    How large a tensor is nothing says: it ends where the last of its parts does. A part in the middle that is missing is noticed here, one
    at the end by the model that it is loaded into.

    Args:
        directory: the folder.
        files: the names of its files.
        headers: of them.

    Raises:
        MetadataError: a header that doesn't say where its parts lie, or parts that don't make up a whole.
        DataFileError: a file is damaged.
        StorageError: the storage refuses.
    """
    parts: dict[str, list[tuple[Region, Site]]] = {}
    types: dict[str, str] = {}
    for file in sorted(name for name in files if _SHARD_OF_RANK.fullmatch(name)):
        path = join(directory, file)
        rank = _rank_of(file)
        offsets = _offsets(headers, file, path)
        for name, entry in headers.get(file).entries.items():
            at = offsets.get(name)
            if not name:
                raise DataFileError("a name that no tensor has", file=path, tensor=repr(name), fix=_FETCH)
            if at is None or len(at.saved_offsets) != len(entry.shape):
                raise MetadataError(
                    "a file of parts of tensors doesn't say where a part lies",
                    file=path,
                    tensor=name,
                    field=_OFFSETS,
                    found="nothing" if at is None else at.saved_offsets,
                    expected=f"{len(entry.shape)} numbers, for a part of shape {list(entry.shape)}",
                    fix=_FETCH,
                )
            if types.setdefault(name, entry.dtype.name) != entry.dtype.name:
                raise MetadataError(
                    "the parts of a tensor have different element types",
                    file=path,
                    tensor=name,
                    found=entry.dtype,
                    expected=types[name],
                    fix=_FETCH,
                )
            parts.setdefault(name, []).append((Region(tuple(at.saved_offsets), entry.shape), Site(file, rank)))
    return _assembled(directory, parts, headers)


def _rank_of(file: str) -> int:
    match = _SHARD_OF_RANK.fullmatch(file)
    # Ranks are counted from 1 there.
    return 0 if match is None else max(0, int(match[1]) - 1)


def _offsets(headers: Headers, file: str, path: str) -> dict[str, _Place]:
    text = headers.get(file).metadata.get(_OFFSETS)
    if text is None:
        raise MetadataError(
            "a file that is named as a rank's parts of tensors doesn't say where they lie",
            file=path,
            field=_OFFSETS,
            found="nothing",
            fix=_FETCH,
        )
    return json_text.decode(text.encode(), _DECODER, path, error=MetadataError)


def _assembled(directory: str, parts: dict[str, list[tuple[Region, Site]]], headers: Headers) -> dict[TensorKey, StoredTensor]:
    known: dict[tuple[object, ...], Arrangement] = {}
    tensors: dict[TensorKey, StoredTensor] = {}
    for name, held in parts.items():
        dtype = headers.get(held[0][1].file).entries[name].dtype
        alike = (dtype.name, tuple(held))
        if alike not in known:
            known[alike] = Arrangement(dtype, *_whole(directory, name, held))
        key = model_key(name)
        tensors[key] = StoredTensor(key, name, known[alike])
    return tensors


def _whole(directory: str, name: str, held: Sequence[tuple[Region, Site]]) -> tuple[tuple[int, ...], None, tuple[Piece, ...]]:
    """A tensor's shape, and its pieces; what several ranks have written is one piece in several places."""
    sites: dict[Region, list[Site]] = {}
    for region, site in held:
        sites.setdefault(region, []).append(site)
    dimensions = len(held[0][0].shape)
    fits = all(len(region.shape) == dimensions for region in sites)
    shape = tuple(max(region.offset[d] + region.shape[d] for region in sites) for d in range(dimensions)) if fits else ()
    fault = cover_fault(list(sites), shape) if fits else "parts of different numbers of dimensions"
    if fault is not None:
        raise MetadataError(
            "the parts of a tensor don't cover it exactly once", file=directory, tensor=name, found=fault, expected=list(shape), fix=_FETCH
        )
    return shape, None, tuple(Piece(region, tuple(own)) for region, own in sites.items())
