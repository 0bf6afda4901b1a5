"""The files in which MindSpore keeps a strategy: Protocol Buffers or JSON, one for each rank or merged; and tables of layouts in JSON.

Source: `node_strategy.proto`, `mindspore/parallel/_parallel_serialization.py` and the runtime that writes such files, MindSpore 2.10.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from reshard.errors import CheckpointNotFoundError, MetadataError
from reshard.format import json_text
from reshard.format.small_file import read_small
from reshard.sources.legacy.cuts import Cut
from reshard.sources.legacy.strategy import Strategy, strategy_of_table
from reshard.sources.legacy.wire import BYTES, VARINT, Field, Messages
from reshard.storage import Storage
from reshard.storage.storage import join

_SUFFIXES = (".ckpt", ".json")

# The numbers of `node_strategy.proto`.
_STRATEGY_ITEM, _LAYOUT_ITEM = 2, 3
_NAME, _OF_NAME = 1, 2
_STAGE = 1
_DEVICE_MATRIX, _FIELD, _STEP, _SIZE = 1, 5, 6, 7

# A merged file has the stage in front of each name.
_MERGED = re.compile(r"(\d{1,6})-(.+)", re.ASCII | re.DOTALL)

# A layout takes some hundred bytes, and a state of 100,000 parameters has three for each.
_MOST_FILE_BYTES = 1 << 28
_MOST_NAME_BYTES = 1 << 16
_MOST_AXES = 64

_WHAT = "a strategy file of MindSpore"
_FIX = "give the strategy files that the run wrote (strategy_ckpt_config, or output/strategy of MindSpore Transformers), or one merged file"


@dataclass(frozen=True)
class _Read:
    """What one file says.

    Attributes:
        path: of the file.
        stage: of the pipeline; None where the file doesn't say.
        cuts: by name, as it is written.
    """

    path: str
    stage: int | None
    cuts: Mapping[str, Cut]


def read_strategy(storage: Storage, path: str) -> Strategy:
    """The strategy that is kept at a path.

    Args:
        storage: where it lies.
        path: a strategy file (`.ckpt`, or `.json`), a directory of them, or a table of layouts in JSON.

    Raises:
        CheckpointNotFoundError: there is nothing of that kind.
        MetadataError: a file is damaged, of another kind, or says what can't be read; or two contradict each other.
        UsageError: a table with something else than layouts.
        StorageError: the storage refuses.
    """
    there = storage.stat(path)
    if there is None:
        raise CheckpointNotFoundError("there are no strategy files", file=path, found="nothing", fix=_FIX)
    files = [path]
    if there.is_directory:
        files = [join(path, entry.name) for entry in storage.list(path) if not entry.is_directory and entry.name.endswith(_SUFFIXES)]
        if not files:
            raise CheckpointNotFoundError("there are no strategy files in this directory", file=path, expected=".ckpt or .json", fix=_FIX)
    read: list[_Read] = []
    for file in files:
        found = _read_json(storage, file) if file.endswith(".json") else _read_protobuf(storage, file)
        if isinstance(found, Strategy):
            if len(files) > 1:
                raise MetadataError("a table of layouts among strategy files", file=file, fix="give the path of one or the other")
            return found
        read.append(found)
    return Strategy(cuts=_merged(read), origin=path)


def _merged(files: Sequence[_Read]) -> dict[str, dict[int, Cut]]:
    """What all files say together: each rank wrote one, and those of a stage say the same."""
    cuts: dict[str, dict[int, Cut]] = {}
    origins: dict[tuple[str, int], str] = {}
    for read in files:
        matches = {name: _MERGED.fullmatch(name) for name in read.cuts}
        is_merged = bool(matches) and all(matches.values())
        if read.stage is None and not is_merged and len(files) > 1:
            raise MetadataError(
                "a strategy file that doesn't say of which pipeline stage it is", file=read.path, field="parallel_strategy_item", fix=_FIX
            )
        for name, cut in read.cuts.items():
            match = matches[name] if is_merged else None
            stage, plain = (read.stage or 0, name) if match is None else (int(match[1]), match[2])
            known = cuts.setdefault(plain, {}).setdefault(stage, cut)
            first = origins.setdefault((plain, stage), read.path)
            if known != cut:
                raise MetadataError(
                    "two strategy files contradict each other",
                    file=read.path,
                    tensor=plain,
                    field=f"stage {stage}",
                    found=_words(cut),
                    expected=f"{_words(known)}, as in {posixpath.basename(first)}",
                    fix="give the files of one run only",
                )
    return cuts


def _words(cut: Cut) -> str:
    return f"device_matrix {list(cut.device_matrix)}, tensor_map {[list(axes) for axes in cut.tensor_map]}, optimizer {cut.shard}"


def _read_protobuf(storage: Storage, path: str) -> _Read:
    with storage.open_read(path) as file:
        if not 0 < file.size <= _MOST_FILE_BYTES:
            raise MetadataError(f"not {_WHAT}", file=path, found=f"{file.size} bytes", fix=_FIX)
        messages = Messages(file, _WHAT, MetadataError)
        stage: int | None = None
        cuts: dict[str, Cut] = {}
        for item in messages.fields(0, file.size):
            if item.number == _LAYOUT_ITEM:
                name, layouts = _named(messages, item)
                if name in cuts:
                    raise messages.bad("two layouts", "one", name)
                cuts[name] = _cut(messages, layouts, name)
            elif item.number == _STRATEGY_ITEM:
                if stage is None:
                    _, strategies = _named(messages, item)
                    stage = next((part.value for part in messages.fields(strategies.begin, strategies.end) if part.number == _STAGE), None)
            elif item.kind != VARINT:
                raise messages.bad(f"field {item.number} before byte {item.end}", "strategies and layouts")
    if not cuts:
        raise MetadataError(f"not {_WHAT}, or one without layouts", file=path, field="parallel_layout_item", found="none", fix=_FIX)
    return _Read(path, stage, cuts)


def _named(messages: Messages, item: Field) -> tuple[str, Field]:
    """The name of an item, and what is said of it."""
    name: str | None = None
    said: Field | None = None
    messages.check_bytes(item)
    for part in messages.fields(item.begin, item.end):
        if part.number == _NAME:
            name = messages.text(part, _MOST_NAME_BYTES)
        elif part.number == _OF_NAME and part.kind == BYTES:
            said = part
    if name is None or said is None:
        raise messages.bad(f"an item without a name or a value before byte {item.end}", "a name and what is said of it")
    return name, said


@dataclass
class _Lists:
    """The lists of a layout, in the order of their numbers."""

    device_matrix: list[list[int]] = field(default_factory=list)
    tensor_map: list[list[int]] = field(default_factory=list)
    split_shape: list[list[int]] = field(default_factory=list)
    indices: list[list[int]] = field(default_factory=list)


def _cut(messages: Messages, layouts: Field, name: str) -> Cut:
    lists = _Lists()
    by_number = dict(enumerate((lists.device_matrix, lists.tensor_map, lists.split_shape, lists.indices), _DEVICE_MATRIX))
    numbers = {_FIELD: 0, _STEP: 0, _SIZE: 0}
    for part in messages.fields(layouts.begin, layouts.end):
        if part.number in by_number:
            by_number[part.number].append(list(_integers(messages, part, name)))
        elif part.number in numbers and part.kind == VARINT:
            numbers[part.number] = part.value
        else:
            raise messages.bad(f"field {part.number} of a layout", "one of the seven of ParallelLayouts", name)
    if len(lists.device_matrix) != 1:
        raise messages.bad(f"{len(lists.device_matrix)} device matrices", "one", name)
    # As MindSpore reads it: several lists are the axes of a dimension each, one is an axis for each dimension.
    maps = [one for one in lists.tensor_map if one] if len(lists.tensor_map) > 1 else lists.tensor_map
    is_flat = len(maps) <= 1
    tensor_map = [(axis,) for one in maps for axis in one] if is_flat else [tuple(one) for one in maps]
    is_manual = any(lists.split_shape) or any(lists.indices)
    return _checked(
        messages.path, name, Cut(tuple(lists.device_matrix[0]), tuple(tensor_map), 0, 0, (), is_flat), numbers, is_manual=is_manual
    )


def _integers(messages: Messages, listed: Field, name: str) -> Iterator[int]:
    messages.check_bytes(listed)
    count = 0
    for part in messages.fields(listed.begin, listed.end):
        for value in messages.integers(part):
            count += 1
            if part.number != 1 or count > _MOST_AXES:
                raise messages.bad(f"field {part.number}, {count} numbers", f"a list of at most {_MOST_AXES} numbers", name)
            yield value


class _JsonItem(msgspec.Struct):
    stage: int | None = None


class _JsonLayout(msgspec.Struct):
    dev_matrix: list[int]
    tensor_map: list[int | list[int]]
    field: int = 0
    opt_weight_shard_step: int = 0
    opt_weight_shard_size: int = 0
    param_split_shape: list[int] = msgspec.field(default_factory=list)
    indices_offset: list[int] = msgspec.field(default_factory=list)


class _JsonStrategy(msgspec.Struct):
    parallel_layout_item: dict[str, _JsonLayout]
    parallel_strategy_item: dict[str, _JsonItem] = msgspec.field(default_factory=dict)


_ANY_DECODER = msgspec.json.Decoder(dict[str, Any])
_JSON_DECODER = msgspec.json.Decoder(_JsonStrategy)


def _read_json(storage: Storage, path: str) -> _Read | Strategy:
    """What a JSON file says: MindSpore's own kind, or a table of layouts."""
    data = read_small(storage, path, _MOST_FILE_BYTES, error=MetadataError)
    anything = json_text.decode(data, _ANY_DECODER, path, error=MetadataError)
    json_text.check_duplicate_keys(data, None, path, error=MetadataError)
    if "parallel_layout_item" not in anything and "parallel_strategy_item" not in anything:
        return strategy_of_table(anything, path)
    read = json_text.decode(data, _JSON_DECODER, path, error=MetadataError)
    stages = [item.stage for item in read.parallel_strategy_item.values() if item.stage is not None]
    cuts: dict[str, Cut] = {}
    for name, layout in read.parallel_layout_item.items():
        tensor_map = tuple(tuple(entry) if isinstance(entry, list) else (entry,) for entry in layout.tensor_map)
        is_flat = not any(isinstance(entry, list) for entry in layout.tensor_map)
        numbers = {_FIELD: layout.field, _STEP: layout.opt_weight_shard_step, _SIZE: layout.opt_weight_shard_size}
        is_manual = bool(layout.param_split_shape or layout.indices_offset)
        cuts[name] = _checked(path, name, Cut(tuple(layout.dev_matrix), tensor_map, 0, 0, (), is_flat), numbers, is_manual=is_manual)
    if not cuts:
        raise MetadataError(f"{_WHAT} without layouts", file=path, field="parallel_layout_item", found="none", fix=_FIX)
    return _Read(path, stages[0] if stages else None, cuts)


def _checked(path: str, name: str, cut: Cut, numbers: Mapping[int, int], *, is_manual: bool) -> Cut:
    """The cut with what the optimizer did; not for tensors that were cut by hand, in parts of sizes of their own."""
    if numbers[_FIELD] or is_manual:
        raise MetadataError(
            "a parameter that was split by hand (field_size, manual_split) can't be read",
            file=path,
            tensor=name,
            field="field" if numbers[_FIELD] else "param_split_shape",
            found=numbers[_FIELD] or "parts of sizes of their own",
            fix="merge it with MindSpore (mindspore.load_distributed_checkpoint), and load what that gives",
        )
    if not cut.device_matrix or min(cut.device_matrix) < 1:
        raise MetadataError(
            "a parameter without devices; of pipeline parallelism alone MindSpore says nothing more",
            file=path,
            tensor=name,
            field="dev_matrix",
            found=list(cut.device_matrix),
            fix='give a table of layouts: {"*": null} says that each rank which has a tensor has all of it',
        )
    # Without a step nothing is cut, whatever the size says: so MindSpore reads it.
    step, shard = numbers[_STEP], numbers[_SIZE]
    return Cut(cut.device_matrix, cut.tensor_map, shard if step else 0, step if shard else 0, cut.axes, cut.is_flat)
