"""The `.metadata` of a checkpoint of torch.distributed.checkpoint: a pickle of dataclasses, as plain data of ours.

Source: `torch/distributed/checkpoint/metadata.py` and `filesystem.py`, PyTorch 2.2 to 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from reshard.errors import DataFileError, MetadataError
from reshard.format.metadata import MOST_METADATA_BYTES
from reshard.format.names import is_plain_file_name
from reshard.format.small_file import read_small
from reshard.geometry import DType, Region
from reshard.sources.pytorch.naming import Path
from reshard.sources.pytorch.objects import TORCH_OBJECTS, extent_of, torch_dtype_of
from reshard.sources.pytorch.pickles import read_pickle
from reshard.sources.pytorch.vocabulary import Record, Word
from reshard.storage import Storage
from reshard.storage.storage import join

DCP_METADATA_FILE = ".metadata"

_HOME = "torch.distributed.checkpoint.metadata."
_OLD_HOME = "torch.distributed._shard.sharded_tensor.metadata."
_DAMAGED = "the metadata is damaged, or of a version that isn't known: load and save it again with PyTorch"

_VOCABULARY = replace(
    TORCH_OBJECTS,
    functions={
        **TORCH_OBJECTS.functions,
        f"{_HOME}_MEM_FORMAT_ENCODING": lambda arguments: arguments[0],
        f"{_OLD_HOME}MEM_FORMAT_ENCODING": lambda arguments: arguments[0],
    },
    records=frozenset(
        {
            *(_HOME + name for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
            *(_HOME + name for name in ("TensorProperties", "MetadataIndex", "StorageMeta")),
            f"{_OLD_HOME}TensorProperties",
            "torch.distributed.checkpoint.filesystem._StorageInfo",
        }
    ),
    persistent=None,
)


@dataclass(frozen=True, slots=True)
class Item:
    """Where a chunk or a value lies.

    Attributes:
        file: the file's name.
        begin: where it begins in the file.
        nbytes: how long it is there, with all that its encoding adds.
    """

    file: str
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """A tensor.

    Attributes:
        dtype: the element type; None for one that checkpoints here don't hold.
        dtype_name: torch's name of it.
        shape: of the whole tensor.
        chunks: its parts, and where each lies.
    """

    dtype: DType | None
    dtype_name: str
    shape: tuple[int, ...]
    chunks: tuple[tuple[Region, Item], ...]


@dataclass(frozen=True)
class DcpMetadata:
    """What the file says.

    Attributes:
        tensors: by key.
        values: what isn't a tensor, by key.
        paths: of each key, its place in the nested dictionary that was saved; empty where that isn't recorded.
    """

    tensors: Mapping[str, DcpTensor]
    values: Mapping[str, Item]
    paths: Mapping[str, Path]


def read_dcp_metadata(storage: Storage, directory: str) -> DcpMetadata:
    """Read a checkpoint's `.metadata`.

    Raises:
        MetadataError: it can't be understood; or it names something that isn't on the list of what is taken from such files.
        StorageError: the storage refuses.
    """
    path = join(directory, DCP_METADATA_FILE)
    data = read_small(storage, path, MOST_METADATA_BYTES, error=MetadataError)
    try:
        root = read_pickle(data, _VOCABULARY, path)
        return _Reading(path).metadata(_fields(root, f"{_HOME}Metadata"))
    except DataFileError as cause:
        raise MetadataError(cause.what, file=path, found=cause.found, expected=cause.expected, fix=cause.fix) from None
    except (ValueError, KeyError, TypeError) as cause:
        raise MetadataError("the metadata can't be understood", file=path, found=str(cause)[:300], fix=_DAMAGED) from None


class _Reading:
    """The records become data; places in files are checked as far as the metadata alone can tell."""

    def __init__(self, path: str) -> None:
        self._path = path

    def metadata(self, fields: Mapping[str, Any]) -> DcpMetadata:
        items: dict[tuple[str, tuple[int, ...] | None], Item] = {}
        for index, info in _dictionary(fields.get("storage_data"), "storage_data").items():
            where = _fields(index, f"{_HOME}MetadataIndex")
            offset = where.get("offset")
            items[_text(where["fqn"]), None if offset is None else extent_of(offset)] = self._item(_text(where["fqn"]), info)
        tensors: dict[str, DcpTensor] = {}
        values: dict[str, Item] = {}
        for key, stored in _dictionary(fields["state_dict_metadata"], "state_dict_metadata").items():
            if type(stored) is Record and stored.name == f"{_HOME}TensorStorageMetadata":
                tensors[_text(key)] = self._tensor(key, stored.fields, items)
            elif type(stored) is Record and stored.name == f"{_HOME}BytesStorageMetadata":
                if (key, None) in items:
                    values[_text(key)] = items[key, None]
            else:
                raise ValueError(f"{key!r} is neither a tensor nor a value")
        return DcpMetadata(tensors, values, self._paths(fields.get("planner_data")))

    def _item(self, key: str, info: Any) -> Item:
        fields = _fields(info, "torch.distributed.checkpoint.filesystem._StorageInfo")
        file, begin, nbytes = _text(fields["relative_path"]), fields["offset"], fields["length"]
        if not is_plain_file_name(file):
            raise MetadataError(
                "a file name that leads out of the checkpoint's directory",
                file=self._path,
                tensor=key,
                found=repr(file[:200]),
                fix="don't load this checkpoint: whoever wrote it wants another file to be read",
            )
        if fields.get("transform_descriptors"):
            raise MetadataError(
                "data that was transformed when it was saved (compressed, perhaps) can't be read",
                file=self._path,
                tensor=key,
                found=str(fields["transform_descriptors"])[:200],
                fix="load and save it again with PyTorch, without extensions",
            )
        begin, nbytes = extent_of((begin, nbytes))
        return Item(file, begin, nbytes)

    def _tensor(self, key: str, fields: Mapping[str, Any], items: Mapping[tuple[str, tuple[int, ...] | None], Item]) -> DcpTensor:
        properties = fields["properties"]
        # A tuple since 2.0: type, layout, whether it needs a gradient, memory format, whether it is pinned.
        word = properties.state[0] if type(properties.state) is tuple else properties.fields["dtype"]
        if type(word) is not Word:
            raise ValueError(f"{key!r} has no element type")
        chunks = []
        for chunk in fields["chunks"]:
            part = _fields(chunk, f"{_HOME}ChunkStorageMetadata")
            region = Region(extent_of(part["offsets"]), extent_of(part["sizes"]))
            item = items.get((key, region.offset))
            if item is None:
                raise MetadataError(
                    "a part of a tensor that is stored nowhere", file=self._path, tensor=key, found=f"no place for {region}", fix=_DAMAGED
                )
            chunks.append((region, item))
        return DcpTensor(torch_dtype_of(word), word.name.removeprefix("torch."), extent_of(fields["size"]), tuple(chunks))

    @staticmethod
    def _paths(planner_data: Any) -> dict[str, Path]:
        """Where each key lies in the nested dictionary; other planners keep other things there."""
        if type(planner_data) is not dict:
            return {}
        return {
            key: where
            for key, where in planner_data.items()
            if type(key) is str and type(where) is tuple and where and all(type(part) in (str, int) for part in where)
        }


def _fields(record: Any, name: str) -> Mapping[str, Any]:
    if type(record) is not Record or record.name != name:
        raise ValueError(f"{name.rpartition('.')[2]} is expected, not {record.name if type(record) is Record else type(record).__name__}")
    return record.fields


def _dictionary(value: Any, name: str) -> Mapping[Any, Any]:
    if type(value) is not dict:
        raise ValueError(f"{name} is a {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"a key that is a {type(value).__name__}")
    return value
