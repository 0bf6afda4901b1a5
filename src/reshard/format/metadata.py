"""`metadata.json`: which chunks a checkpoint's tensors have, and where each is stored."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Annotated

import msgspec

from reshard.catalog import Catalog, Chunk, Place, StoredTensor
from reshard.errors import CaptureError, LayoutError, MetadataError
from reshard.format import json_text
from reshard.format.names import is_plain_file_name, kind_of_file, parse_storage_key, parse_tensor_name, storage_key, tensor_name
from reshard.format.parameter import Parameter, decode_parameter, encode_parameter, number_slices
from reshard.geometry import DType
from reshard.geometry.tensor_map import slices_of
from reshard.state import Kind
from reshard.version import __version__

# What this project adds to the contract's keys. A reader refuses a newer one: it may leave out what an older reader needs.
FORMAT_VERSION = 1

_DAMAGED = "the metadata is damaged: restore it from a copy, or resume from another iteration"


class _Metadata(msgspec.Struct):
    state_dict_metadata: dict[str, msgspec.Raw]
    storage_data: dict[str, msgspec.Raw]
    format_version: int | None = None
    writer: str | None = None


class _Entry(msgspec.Struct, gc=False):
    file_name: str
    storage_rank: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    rank_group: list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]] = msgspec.field(default_factory=list)
    name: str | None = None


_METADATA = msgspec.json.Decoder(_Metadata)
_ENTRIES = msgspec.json.Decoder(Annotated[list[_Entry], msgspec.Meta(min_length=1)])


def encode_metadata(catalog: Catalog) -> bytes:
    """The file's bytes: one line of compact ASCII JSON, in the contract's order of keys.

    Beside the contract's keys there are `format_version` and `writer` at the top, per chunk `offset`, per storage entry `name` where the
    tensor has another name in the file, and per tensor `kind` where nothing is stored. A layout that doesn't split evenly can't be said
    and becomes null. What the published reader can't read (several chunks without a layout) it refuses, naming the tensor.

    Raises:
        CaptureError: two tensors of one name in files.
        LayoutError: chunks that don't make up their tensor.
        MetadataError: a chunk without a place, or a place that is not a file of the tensor's kind.
    """
    writer = _Writer()
    parameters: dict[str, str] = {}
    storage: list[tuple[int, str]] = []
    for tensor in catalog.tensors.values():
        name = tensor_name(tensor.key)
        if name in parameters:
            raise CaptureError("two tensors have the same name in files", tensor=name, fix="rename the parameter or the optimizer's slot")
        text, numbers = writer.parameter(tensor, name)
        parameters[name] = text
        for chunk, number in zip(tensor.chunks, numbers, strict=True):
            if chunk.places:
                key = encode_basestring_ascii(storage_key(name, number))
                storage.append((chunk.places[0].rank, f"{key}:[{writer.places(chunk, tensor.key.kind, name)}]"))
    # The published writer goes rank by rank; the sort is stable, so that a rank's chunks stay in the order of the tensors.
    storage.sort(key=lambda item: item[0])
    head = ",".join(f"{encode_basestring_ascii(name)}:{text}" for name, text in parameters.items())
    tail = ",".join(text for _, text in storage)
    more = f'"format_version":{FORMAT_VERSION},"writer":"reshard {__version__}"'
    return f'{{"state_dict_metadata":{{{head}}},"storage_data":{{{tail}}},{more}}}'.encode("ascii")


class _Writer:
    """Makes each kind of text once."""

    def __init__(self) -> None:
        self._parameters: dict[object, tuple[str, list[int]]] = {}
        self._places: dict[tuple[Place, Kind, tuple[int, ...]], str] = {}
        self._groups: dict[tuple[int, ...], str] = {}
        self._heads: dict[tuple[str, int, Kind], str] = {}

    def parameter(self, tensor: StoredTensor, name: str) -> tuple[str, list[int]]:
        """The tensor's entry, and the slice id of each chunk."""
        layout = tensor.layout
        if layout is not None and (len(layout.split) != len(tensor.global_shape) or not layout.is_even(tensor.global_shape)):
            layout = None
        kind = None if any(chunk.places for chunk in tensor.chunks) else tensor.key.kind.value
        regions = tuple(chunk.region for chunk in tensor.chunks)
        # The layout by identity: hashing it would go over every rank of its mesh. The catalog keeps it alive.
        key = (id(layout), tensor.dtype.name, tensor.global_shape, regions, kind)
        made = self._parameters.get(key)
        if made is None:
            try:
                numbers = number_slices(layout, tensor.global_shape, regions)
            except LayoutError as cause:
                raise LayoutError(cause.what, tensor=name, found=cause.found, expected=cause.expected) from cause
            # The contract lists a layout's slices in the order in which its ranks hold them first.
            order = None if layout is None else {number: place for place, number in enumerate(slices_of(layout, tensor.global_shape))}
            slices = dict(sorted(zip(numbers, regions, strict=True), key=lambda item: item[0] if order is None else order[item[0]]))
            text = encode_parameter(Parameter(tensor.dtype, tensor.dtype.mindspore, tensor.global_shape, layout, slices, kind))
            made = self._parameters[key] = (text, numbers)
        for chunk in tensor.chunks:
            if not chunk.places and not chunk.region.is_empty:
                raise MetadataError(
                    "a chunk is stored nowhere", tensor=name, found=f"no place for the region at {list(chunk.region.offset)}"
                )
        return made

    def places(self, chunk: Chunk, kind: Kind, name: str) -> str:
        """The storage entries of a chunk."""
        group = self._groups.get(chunk.holders)
        if group is None:
            group = f',"rank_group":[{",".join(map(str, chunk.holders))}]' if chunk.holders else ""
            self._groups[chunk.holders] = group
        entries = []
        for place in chunk.places:
            key = (place.file, place.rank, kind)
            head = self._heads.get(key)
            if head is None:
                head = self._heads[key] = self._head(place, kind, name)
            other = "" if place.name == name else f',"name":{encode_basestring_ascii(place.name)}'
            entries.append(f"{head}{group}{other}}}")
        return ",".join(entries)

    @staticmethod
    def _head(place: Place, kind: Kind, name: str) -> str:
        if not is_plain_file_name(place.file) or kind_of_file(place.file) not in (kind, None):
            raise MetadataError(
                "a tensor is stored in a file that can't hold it",
                tensor=name,
                field="file_name",
                found=place.file,
                expected=f"a file of kind {kind.value}",
            )
        return f'{{"file_name":{encode_basestring_ascii(place.file)},"storage_rank":{place.rank}'


@dataclass(frozen=True)
class _Stored:
    """The storage entries of a slice: file, name in it if it has another one, rank; who held it; what the files hold."""

    entries: tuple[tuple[str, str | None, int], ...]
    holders: tuple[int, ...]
    kind: Kind
    colons: int


def decode_metadata(data: bytes, file: str, dtype_of: Callable[[Place], DType] | None = None) -> Catalog:
    """The catalog that the file describes; the inverse of `encode_metadata`.

    Args:
        data: the file's bytes.
        file: its path; the catalog's directory is the file's.
        dtype_of: gives the element type of a stored tensor where metadata names one that isn't known here (the contract leaves it open
            then). Without it such a tensor is an error.

    Raises:
        MetadataError: it isn't JSON of the contract, contradicts itself, names files outside the directory, or leaves a part of a tensor
            unstored.
    """
    wire = json_text.decode(data, _METADATA, file)
    if wire.format_version is not None and not 1 <= wire.format_version <= FORMAT_VERSION:
        raise MetadataError(
            "the checkpoint was written by a newer version of reshard",
            file=file,
            field="format_version",
            found=f"{wire.format_version}, written by {wire.writer}",
            expected=f"at most {FORMAT_VERSION}",
            fix="install that version",
        )
    reader = _Reader(file, wire.storage_data, dtype_of)
    tensors = [reader.tensor(name, raw) for name, raw in wire.state_dict_metadata.items()]
    notes = reader.finish(wire.state_dict_metadata)
    colons = 2 + (wire.format_version is not None) + (wire.writer is not None) + reader.colons
    json_text.check_duplicate_keys(data, colons, file)
    return Catalog(posixpath.dirname(file), {tensor.key: tensor for tensor in tensors}, notes)


class _Reader:
    """Understands each kind of text once."""

    def __init__(self, file: str, storage: dict[str, msgspec.Raw], dtype_of: Callable[[Place], DType] | None) -> None:
        self._file = file
        self._storage = storage
        self._dtype_of = dtype_of
        self._parameters: dict[bytes, tuple[Parameter, int]] = {}
        self._stored: dict[bytes, _Stored] = {}
        self._unusual: dict[tuple[str, int], str] | None = None
        self.colons = 0

    def tensor(self, name: str, raw: msgspec.Raw) -> StoredTensor:
        """The tensor of an entry, with its chunks' places."""
        text = bytes(raw)
        known = self._parameters.get(text)
        if known is None:
            known = self._parameters[text] = (decode_parameter(text, name, self._file), text.count(b":"))
        parameter, colons = known
        self.colons += 1 + colons
        chunks = []
        kinds = set()
        for number, region in parameter.slices.items():
            stored = self._find(name, number)
            if stored is None:
                if not region.is_empty:
                    raise self._error(
                        "a chunk is stored nowhere", name, field="storage_data", found=f"no entry {storage_key(name, number)}"
                    )
                if parameter.layout is not None or len(parameter.slices) == 1:
                    chunks.append(Chunk(region, ()))
            else:
                kinds.add(stored.kind)
                places = tuple(Place(entry_file, other or name, rank) for entry_file, other, rank in stored.entries)
                chunks.append(Chunk(region, places, stored.holders))
        if len(kinds) > 1:
            raise self._error("a tensor is stored in model files and in optimizer files", name, field="file_name")
        key = parse_tensor_name(name, kinds.pop() if kinds else Kind(parameter.kind) if parameter.kind in ("model", "opt") else Kind.MODEL)
        return StoredTensor(key, self._dtype(parameter, name, chunks), parameter.global_shape, parameter.layout, tuple(chunks))

    def finish(self, names: Mapping[str, object]) -> tuple[str, ...]:
        """Look at storage that no tensor asked for."""
        unknown = []
        for key, raw in self._storage.items():
            name, number = self._parse(key)
            if name in names:
                raise self._error(
                    "storage for a chunk that the tensor doesn't have", name, field="storage_data", found=f"slice id {number}"
                )
            self.colons += 1 + self._read(bytes(raw), name).colons
            unknown.append(name)
        if not unknown:
            return ()
        some = ", ".join(sorted(set(unknown))[:5])
        return (f"storage_data names {len(unknown)} chunks of tensors that the metadata doesn't describe; ignored: {some}",)

    def _find(self, name: str, number: int) -> _Stored | None:
        raw = self._storage.pop(storage_key(name, number), None)
        if raw is None:
            # Python versions differ in what they escape, and other writers may quote otherwise: compare what the keys mean.
            if self._unusual is None:
                self._unusual = {parsed: key for key in self._storage if (parsed := self._parse(key)) and storage_key(*parsed) != key}
            key = self._unusual.pop((name, number), None)
            if key is None:
                return None
            raw = self._storage.pop(key)
        stored = self._read(bytes(raw), name)
        self.colons += 1 + stored.colons
        return stored

    def _parse(self, key: str) -> tuple[str, int]:
        try:
            return parse_storage_key(key)
        except MetadataError as cause:
            raise MetadataError(
                cause.what, file=self._file, field=cause.field, found=cause.found, expected=cause.expected, fix=_DAMAGED
            ) from cause

    def _read(self, text: bytes, name: str) -> _Stored:
        stored = self._stored.get(text)
        if stored is None:
            stored = self._stored[text] = self._understand(text, name)
        return stored

    def _understand(self, text: bytes, name: str) -> _Stored:
        try:
            entries = json_text.decode(text, _ENTRIES, self._file)
            json_text.check_duplicate_keys(text, None, self._file)
        except MetadataError as cause:
            raise self._error(cause.what, name, field="storage_data", found=cause.found) from cause
        holders: set[int] = set()
        kinds = set()
        for entry in entries:
            if not is_plain_file_name(entry.file_name):
                raise self._error(
                    "a file name that leads out of the checkpoint's directory", name, field="file_name", found=repr(entry.file_name)
                )
            kinds.add(kind_of_file(entry.file_name) or Kind.MODEL)
            holders.update(entry.rank_group)
        if len(kinds) > 1:
            raise self._error(
                "a tensor is stored in model files and in optimizer files", name, field="file_name", found=entries[0].file_name
            )
        places = tuple((entry.file_name, entry.name, entry.storage_rank) for entry in entries)
        return _Stored(places, tuple(sorted(holders)), kinds.pop(), text.count(b":"))

    def _dtype(self, parameter: Parameter, name: str, chunks: list[Chunk]) -> DType:
        if parameter.dtype is not None:
            return parameter.dtype
        places = [place for chunk in chunks for place in chunk.places]
        if self._dtype_of is None or not places:
            raise self._error("an element type that is not known here", name, field="dtype", found=parameter.dtype_name)
        return self._dtype_of(places[0])

    def _error(self, what: str, name: str, *, field: str, found: object = None) -> MetadataError:
        return MetadataError(what, file=self._file, tensor=name, field=field, found=found, fix=_DAMAGED)
