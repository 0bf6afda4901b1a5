"""Extras: trees of values beside the tensors (scheduler, data position, random states, hyper-parameters), as safetensors files of our own.

A tree becomes JSON text, which lies in the header's metadata, and arrays, which are the file's tensors. What JSON has no word for is an
object with one key that begins with `$`.
"""

from __future__ import annotations

import base64
import json
import math
import reprlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reshard.errors import CaptureError, MetadataError, UsageError
from reshard.format.safetensors import check_bytes, plan_header, read_header, write_tensors
from reshard.format.seal import SealedFile
from reshard.geometry.dtypes import by_numpy
from reshard.state import ParameterGroup
from reshard.storage import Storage

EXTRA_FORMAT = "reshard-extra-1"

# JSON decoders promise integers of 64 bits.
_PLAIN_INTEGERS = range(-(2**63), 2**63)
# Longer bytes are an array: as text they would take a third more, and the header has a limit.
_TEXT_BYTES = 256
# Far deeper than any state, far from the interpreter's own limit.
_MAX_DEPTH = 100

_MAPPINGS: dict[str, type[dict[Any, Any]]] = {"$dict": dict, "$ordered": OrderedDict, "$counter": Counter}
_SEQUENCES: dict[str, type[list[Any] | tuple[Any, ...] | set[Any] | frozenset[Any]]] = {
    "$list": list,
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
}
_MAPPING_TAGS = {kind: tag for tag, kind in _MAPPINGS.items()}
_SEQUENCE_TAGS = {kind: tag for tag, kind in _SEQUENCES.items()}


@dataclass(frozen=True)
class FrameworkArray:
    """A framework's tensor inside a tree.

    Attributes:
        framework: `torch` or `mindspore`.
        dtype: the framework's name of the element type, where numpy's would not do.
        array: the values.
    """

    framework: str
    dtype: str
    array: np.ndarray

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FrameworkArray):
            return NotImplemented
        same = self.framework == other.framework and self.dtype == other.dtype and self.array.dtype == other.array.dtype
        return same and self.array.shape == other.array.shape and self.array.tobytes() == other.array.tobytes()

    def __hash__(self) -> int:
        return hash((self.framework, self.dtype, self.array.shape))


def encode_tree(tree: Any) -> tuple[str, dict[str, np.ndarray]]:
    """A tree as JSON text and arrays by name.

    Args:
        tree: values of JSON, NaN and infinities, integers of any size, tuples, sets, bytes, dictionaries with any such keys (also ordered
            ones and counters), numpy arrays and scalars, framework arrays.

    Raises:
        CaptureError: anything else, naming the path inside the tree.
    """
    encoder = _Encoder()
    value = encoder.encode(tree, "")
    return json.dumps(value, separators=(",", ":"), allow_nan=False), encoder.arrays


class _Encoder:
    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._open: list[int] = []

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if value in _PLAIN_INTEGERS else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is bytes:
            if len(value) <= _TEXT_BYTES:
                return {"$bytes": base64.b64encode(value).decode("ascii")}
            return {"$long_bytes": self._keep(np.frombuffer(value, np.uint8), path)}
        if isinstance(value, np.generic):
            return {"$scalar": self._keep(np.asarray(value), path)}
        if isinstance(value, FrameworkArray):
            return {"$framework": [value.framework, value.dtype, self._keep(value.array, path)]}
        if kind is np.ndarray:
            return {"$array": self._keep(value, path)}
        if kind in _SEQUENCE_TAGS or kind in _MAPPING_TAGS:
            return self._container(value, path)
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise CaptureError(
            "a value that a checkpoint can't hold",
            field=path or "the whole tree",
            found=f"{name}: {_short(value)}",
            expected="values of JSON, tuples, sets, bytes, numpy arrays and scalars, tensors",
            fix="save what it consists of, or leave it out",
        )

    def _keep(self, array: np.ndarray, path: str) -> str:
        try:
            by_numpy(array.dtype)
        except UsageError as cause:
            raise CaptureError(
                cause.what,
                field=path or "the whole tree",
                found=f"array of {array.dtype}",
                expected=f"{cause.expected}, in native byte order",
            ) from cause
        name = f"array-{len(self.arrays):06d}"
        self.arrays[name] = array
        return name

    def _container(self, value: Any, path: str) -> Any:
        if id(value) in self._open:
            raise CaptureError("a value contains itself", field=path, found=_short(value))
        if len(self._open) >= _MAX_DEPTH:
            raise CaptureError("values are nested too deeply", field=path[:200], found=f"more than {_MAX_DEPTH} levels")
        self._open.append(id(value))
        kind = type(value)
        if kind in _MAPPING_TAGS:
            encoded = self._mapping(value, kind, path)
        else:
            items = [self.encode(item, f"{path}[{index}]") for index, item in enumerate(value)]
            if kind in (set, frozenset):
                items.sort(key=json.dumps)
            encoded = items if kind is list else {_SEQUENCE_TAGS[kind]: items}
        self._open.pop()
        return encoded

    def _mapping(self, value: dict[Any, Any], kind: type, path: str) -> Any:
        def inside(key: Any) -> str:
            if type(key) is str:
                return f"{path}.{key}" if path else key
            return f"{path}[{_short(key)}]"

        if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, inside(key)) for key, item in value.items()}
        pairs = []
        for key, item in value.items():
            pairs.append([self.encode(key, f"{inside(key)} (the key)"), self.encode(item, inside(key))])
        return {_MAPPING_TAGS[kind]: pairs}


def decode_tree(text: str, arrays: Mapping[str, np.ndarray], from_value: Callable[[FrameworkArray], Any] | None = None) -> Any:
    """The inverse of `encode_tree`.

    Args:
        text: the JSON text.
        arrays: the arrays by name.
        from_value: makes the framework's tensor of a framework array; without it the tree holds the `FrameworkArray`.

    Raises:
        MetadataError: it isn't such a text, or an array is missing.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
        return _Decoder(arrays, from_value).decode(value)
    except RecursionError as cause:
        raise MetadataError("extras are nested too deeply") from cause
    except (ValueError, TypeError, KeyError) as cause:
        raise MetadataError("extras can't be understood", found=f"{type(cause).__name__}: {cause}") from cause


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no value of JSON")


class _Decoder:
    def __init__(self, arrays: Mapping[str, np.ndarray], from_value: Callable[[FrameworkArray], Any] | None) -> None:
        self._arrays = arrays
        self._from_value = from_value

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        tag = next(iter(value), "")
        if not tag.startswith("$"):
            return {key: self.decode(item) for key, item in value.items()}
        if len(value) > 1:
            raise ValueError(f"an object with {tag!r} and other keys")
        return self._tagged(tag, value[tag])

    def _tagged(self, tag: str, value: Any) -> Any:
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](self._items(value))
        if tag in _MAPPINGS:
            mapping = _MAPPINGS[tag]()
            for key, item in self._pairs(value):
                mapping[key] = item
            return mapping
        if tag == "$int":
            return int(value, 16)
        if tag == "$float":
            if value not in ("nan", "inf", "-inf"):
                raise ValueError(f"a number {value!r}")
            return float(value)
        if tag == "$bytes":
            return base64.b64decode(value, validate=True)
        if tag == "$long_bytes":
            return self._array(value).tobytes()
        if tag == "$array":
            return self._array(value)
        if tag == "$scalar":
            return self._array(value)[()]
        if tag == "$framework":
            framework, dtype, name = value
            array = FrameworkArray(framework, dtype, self._array(name))
            return array if self._from_value is None else self._from_value(array)
        raise ValueError(f"an unknown kind of value {tag!r}: written by a newer version")

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            raise ValueError(f"the array {name!r} is missing")
        return self._arrays[name]

    def _items(self, value: Any) -> Iterator[Any]:
        if not isinstance(value, list):
            raise TypeError(f"a list is expected, not {_short(value)}")
        return map(self.decode, value)

    def _pairs(self, value: Any) -> list[tuple[Any, Any]]:
        return [(key, item) for key, item in self._items(value)]


def write_extra(storage: Storage, path: str, tree: Any) -> SealedFile:
    """Write a tree as a new file, durable when this returns.

    Returns:
        What the checkpoint's seal says of the file.

    Raises:
        CaptureError: the tree holds something that can't be saved.
        StorageError: the storage refuses.
    """
    text, arrays = encode_tree(tree)
    header = plan_header(
        [(name, by_numpy(array.dtype), array.shape) for name, array in arrays.items()], {"format": EXTRA_FORMAT, "tree": text}
    )
    return write_tensors(storage, path, header, ((name, arrays[name]) for name in header.entries))


def read_extra(
    storage: Storage, path: str, from_value: Callable[[FrameworkArray], Any] | None = None, *, sealed: SealedFile | None = None
) -> Any:
    """The tree of a file; None when there is no such file.

    Args:
        storage: where it lies.
        path: the file.
        from_value: as in `decode_tree`.
        sealed: what the checkpoint's seal says of the file: then it must be there, and be that file.

    Raises:
        DamagedCheckpointError: the file is damaged, of another format, or not the one that was sealed.
        StorageError: the storage refuses.
    """
    if sealed is None and storage.stat(path) is None:
        return None
    header = read_header(storage, path, sealed)
    found = header.metadata.get("format")
    if found != EXTRA_FORMAT or "tree" not in header.metadata:
        raise MetadataError("not a file of extras, or of a newer version", file=path, field="format", found=found, expected=EXTRA_FORMAT)
    arrays = {}
    with storage.open_read(path) as file:
        for entry in header.entries.values():
            array = np.empty(entry.shape, entry.dtype.numpy)
            data = memoryview(array.reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8))
            file.read_into(entry.begin, data)
            check_bytes(entry, data, path)
            arrays[entry.name] = array
    try:
        return decode_tree(header.metadata["tree"], arrays, from_value)
    except MetadataError as cause:
        raise MetadataError(cause.what, file=path, found=cause.found, fix="the file is damaged: restore it from a copy") from cause


def global_tree(values: Mapping[str, Any], groups: Sequence[ParameterGroup]) -> dict[str, Any]:
    """The tree of the file of global extras: the global values, and the hyper-parameters of all parameters of the run."""
    listed = [{"options": dict(g.options), "parameters": list(g.parameters), "unstepped": list(g.unstepped)} for g in groups]
    return {"values": dict(values), "groups": listed}


def groups_of(tree: Any, file: str | None = None) -> tuple[ParameterGroup, ...]:
    """The hyper-parameters in such a tree; none when there is no tree.

    Raises:
        MetadataError: they can't be understood.
    """
    if tree is None:
        return ()
    groups = tree.get("groups", []) if isinstance(tree, dict) else None
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise MetadataError("the hyper-parameters in the extras can't be understood", file=file, field="groups", found=_short(groups))
    return tuple(ParameterGroup(g["options"], tuple(g["parameters"]), tuple(g.get("unstepped", ()))) for g in groups)


def values_in(tree: Any, file: str | None = None) -> Mapping[str, Any]:
    """The global values in such a tree; none when there is no tree.

    Raises:
        MetadataError: they can't be understood.
    """
    return {} if tree is None else _named_values(tree, "values", file)


def rank_values_in(tree: Any, world_size: int, place: str, file: str | None = None) -> Mapping[str, Any] | None:
    """The values of a rank in the tree of its file; None when they are of another place, or when there is no tree.

    Args:
        tree: as `read_extra` gave it.
        world_size: the number of ranks of the run that reads.
        place: the name of the rank's place in its strategy.
        file: for errors.

    Raises:
        MetadataError: they can't be understood.
    """
    if tree is None:
        return None
    values = _named_values(tree, "rank_values", file)
    return values if tree.get("world_size") == world_size and tree.get("place") == place else None


def _named_values(tree: Any, field: str, file: str | None) -> Mapping[str, Any]:
    values = tree.get(field, {}) if isinstance(tree, dict) else None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise MetadataError("the values in the extras can't be understood", file=file, field=field, found=_short(tree))
    return values


def _is_group(group: Any) -> bool:
    if not isinstance(group, dict) or not isinstance(group.get("options"), dict):
        return False
    names = [group.get("parameters"), group.get("unstepped", [])]
    return all(isinstance(listed, (list, tuple)) and all(isinstance(name, str) for name in listed) for listed in names)


def _short(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except Exception as error:  # noqa: BLE001 (a foreign __repr__ may raise anything, and this only describes)
        return f"<{type(value).__name__} whose repr fails: {type(error).__name__}>"
