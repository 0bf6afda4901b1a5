"""`metadata.json`: which chunks a checkpoint's tensors have, and where each is stored."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from json.encoder import encode_basestring_ascii
from typing import Annotated

import msgspec

from reshard.catalog import Arrangement, Catalog, Piece, Place, Site, StoredTensor
from reshard.errors import CaptureError, LayoutError, MetadataError
from reshard.format import json_text
from reshard.format.names import (
    first_repeated,
    is_plain_file_name,
    is_tensor_name,
    kind_of_file,
    parse_storage_key,
    parse_tensor_name,
    storage_key,
    tensor_names,
)
from reshard.format.parameter import Parameter, decode_parameter, encode_parameter, number_slices
from reshard.geometry import DType
from reshard.geometry.tensor_map import slices_of
from reshard.state import Kind
from reshard.version import __version__

# What this project adds to the contract's keys. A reader refuses a newer one: it may leave out what an older reader needs.
FORMAT_VERSION = 2

# From this version on a checkpoint has a seal: where there is none, it is lost.
SEALED_SINCE = 2

# Above what any job needs: a stored chunk takes about 120 bytes, so that 10,000 tensors on 3,000 ranks, each with a chunk of its own, fit.
# It is held in memory whole, and so is what it says, which takes some times as much.
MOST_METADATA_BYTES = 4 << 30

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


# The text of a key of `storage_data` (`storage_key`) between the tensor's name and the slice's number.
_BEFORE_NUMBER = ", ("

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
    tensors = catalog.tensors.values()
    names = tensor_names([tensor.key for tensor in tensors])
    if len(set(names)) < len(names):
        raise CaptureError(
            "two tensors have the same name in files", tensor=first_repeated(names), fix="rename the parameter or the optimizer's slot"
        )
    writer = _Writer()
    written = list(map(writer.arrangement, tensors, names))
    texts = [b'{"state_dict_metadata":{']
    texts += chain.from_iterable(zip(map(_quoted, names), [made.parameter for made in written], strict=True))
    _end_list(texts)
    texts.append(b'},"storage_data":{')
    # What comes before the slice's number is the same for all of a tensor.
    for name, key, made in zip(names, map(_begin_key, names), written, strict=True):
        for own, end in made.storage:
            own.append(key)
            own.append(end if isinstance(end, bytes) else end(name))
    # The published writer goes rank by rank; a rank's chunks are in the order of the tensors.
    texts += chain.from_iterable(own for _, own in sorted(writer.by_rank.items()))
    _end_list(texts)
    texts.append(f'}},"format_version":{FORMAT_VERSION},"writer":"reshard {__version__}"}}'.encode())
    return b"".join(texts)


def _quoted(text: str) -> bytes:
    return encode_basestring_ascii(text).encode()


def _begin_key(name: str) -> bytes:
    """A key of `storage_data` as it stands in the file, up to the slice's number."""
    return encode_basestring_ascii(f"({name!r}{_BEFORE_NUMBER}")[:-1].encode()


def _end_list(texts: list[bytes]) -> None:
    """Take the comma from what is the last of a list."""
    texts[-1] = texts[-1].removesuffix(b",")


@dataclass(frozen=True)
class _Written:
    """What tensors that lie alike have in common in the file, up to the comma that follows.

    Attributes:
        parameter: the text of their entry, from the colon on.
        storage: of each stored chunk the texts of the rank of its first file, to which its own is added: that of its storage entries from
            the slice's number on, or what makes that for a name.
    """

    parameter: bytes
    storage: list[tuple[list[bytes], bytes | Callable[[str], bytes]]]


class _Writer:
    """Makes each kind of text once.

    Attributes:
        by_rank: the texts of the storage entries of chunks whose first file is the rank's.
    """

    def __init__(self) -> None:
        self.by_rank: dict[int, list[bytes]] = {}
        self._written: dict[tuple[int, Kind], _Written] = {}
        self._parameters: dict[object, tuple[str, list[int]]] = {}
        self._groups: dict[tuple[int, ...], str] = {}

    def arrangement(self, tensor: StoredTensor, name: str) -> _Written:
        """The texts of a tensor's arrangement."""
        key = (id(tensor.arrangement), tensor.key.kind)
        made = self._written.get(key)
        if made is None:
            text, numbers = self._parameter(tensor, name)
            pieces = zip(tensor.arrangement.pieces, numbers, strict=True)
            storage = [
                (self.by_rank.setdefault(piece.sites[0].rank, []), self._places(piece, number, tensor.key.kind, name))
                for piece, number in pieces
                if piece.sites
            ]
            made = self._written[key] = _Written(f":{text},".encode(), storage)
        return made

    def _parameter(self, tensor: StoredTensor, name: str) -> tuple[str, list[int]]:
        """The tensor's entry, and the slice id of each chunk."""
        layout, pieces = tensor.layout, tensor.arrangement.pieces
        if layout is not None and (len(layout.split) != len(tensor.global_shape) or not layout.is_even(tensor.global_shape)):
            layout = None
        for piece in pieces:
            if not piece.sites and not piece.region.is_empty:
                raise MetadataError(
                    "a chunk is stored nowhere", tensor=name, found=f"no place for the region at {list(piece.region.offset)}"
                )
        kind = None if any(piece.sites for piece in pieces) else tensor.key.kind.value
        regions = tuple(piece.region for piece in pieces)
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
        return made

    def _places(self, piece: Piece, number: int, kind: Kind, name: str) -> bytes | Callable[[str], bytes]:
        """The storage entries of a chunk, or what makes them for a tensor's name."""
        begin = f'{number},))":['
        group = self._groups.get(piece.holders)
        if group is None:
            group = f',"rank_group":[{",".join(map(str, piece.holders))}]' if piece.holders else ""
            self._groups[piece.holders] = group
        heads = [(f"{self._head(site, kind, name)}{group}", site.suffix) for site in piece.sites]
        if not any(suffix for _, suffix in heads):
            return f"{begin}{','.join(f'{head}}}' for head, _ in heads)}],".encode()

        def named(own: str) -> bytes:
            others = [f',"name":{encode_basestring_ascii(own + suffix)}' if suffix else "" for _, suffix in heads]
            return f"{begin}{','.join(f'{head}{other}}}' for (head, _), other in zip(heads, others, strict=True))}],".encode()

        return named

    @staticmethod
    def _head(site: Site, kind: Kind, name: str) -> str:
        if not is_plain_file_name(site.file) or kind_of_file(site.file) not in (kind, None):
            raise MetadataError(
                "a tensor is stored in a file that can't hold it",
                tensor=name,
                field="file_name",
                found=site.file,
                expected=f"a file of kind {kind.value}",
            )
        return f'{{"file_name":{encode_basestring_ascii(site.file)},"storage_rank":{site.rank}'


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
    return Catalog(posixpath.dirname(file), {tensor.key: tensor for tensor in tensors}, notes, wire.format_version)


class _Reader:
    """Understands each kind of text once."""

    def __init__(self, file: str, storage: dict[str, msgspec.Raw], dtype_of: Callable[[Place], DType] | None) -> None:
        self._file = file
        self._storage = storage
        self._dtype_of = dtype_of
        self._parameters: dict[bytes, tuple[Parameter, int]] = {}
        self._stored: dict[bytes, _Stored] = {}
        self._arrangements: dict[tuple[int, ...], tuple[Arrangement, Kind]] = {}
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
        found = tuple(self._find(name, number) for number in parameter.slices)
        alike = (id(parameter), *map(id, found))
        arranged = self._arrangements.get(alike)
        if arranged is None:
            arranged = self._arrange(name, parameter, found)
            if parameter.dtype is not None:
                # The parameter and the storage entries live as long as this reader: their identities stay theirs.
                self._arrangements[alike] = arranged
        arrangement, kind = arranged
        if not is_tensor_name(name, kind):
            raise self._error("a name that no tensor has", name, field="state_dict_metadata", found=repr(name))
        return StoredTensor(parse_tensor_name(name, kind), name, arrangement)

    def _arrange(self, name: str, parameter: Parameter, found: tuple[_Stored | None, ...]) -> tuple[Arrangement, Kind]:
        pieces = []
        kinds = set()
        for (number, region), stored in zip(parameter.slices.items(), found, strict=True):
            if stored is None:
                if not region.is_empty:
                    raise self._error(
                        "a chunk is stored nowhere", name, field="storage_data", found=f"no entry {storage_key(name, number)}"
                    )
                if parameter.layout is not None or len(parameter.slices) == 1:
                    pieces.append(Piece(region, ()))
            else:
                kinds.add(stored.kind)
                sites = tuple(Site(entry_file, rank, self._suffix(name, other)) for entry_file, other, rank in stored.entries)
                pieces.append(Piece(region, sites, stored.holders))
        if len(kinds) > 1:
            raise self._error("a tensor is stored in model files and in optimizer files", name, field="file_name")
        kind = kinds.pop() if kinds else Kind(parameter.kind) if parameter.kind in ("model", "opt") else Kind.MODEL
        return Arrangement(self._dtype(parameter, name, pieces), parameter.global_shape, parameter.layout, tuple(pieces)), kind

    def _suffix(self, name: str, other: str | None) -> str:
        if other is None:
            return ""
        if not other.startswith(name):
            raise self._error("a tensor is stored under a foreign name", name, field="name", found=other)
        return other[len(name) :]

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

    def _dtype(self, parameter: Parameter, name: str, pieces: list[Piece]) -> DType:
        if parameter.dtype is not None:
            return parameter.dtype
        places = [Place(site.file, name + site.suffix, site.rank) for piece in pieces for site in piece.sites]
        if self._dtype_of is None or not places:
            raise self._error("an element type that is not known here", name, field="dtype", found=parameter.dtype_name)
        return self._dtype_of(places[0])

    def _error(self, what: str, name: str, *, field: str, found: object = None) -> MetadataError:
        return MetadataError(what, file=self._file, tensor=name, field=field, found=found, fix=_DAMAGED)
