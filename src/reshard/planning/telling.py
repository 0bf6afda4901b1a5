"""The descriptions of ranks as bytes, on their way to the other ranks.

What ranks have in common is written so that it can be seen to be the same without a look inside: thousands of ranks hold the same tensors,
and what a rank holds of them differs in a few numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import numpy as np

from reshard.errors import CommunicationError, ReshardError
from reshard.geometry import Layout, Mesh, Region
from reshard.geometry.dtypes import by_name
from reshard.planning.agreement import Holding, RankDescription, TensorTable
from reshard.rows import rows
from reshard.state import Kind, TensorKey

T = TypeVar("T")

# Names and numbers shrink to a fifth; a higher level takes twice the time for a tenth less.
_COMPRESSION = 1

_KINDS = tuple(Kind)
_KIND_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}

_Numbers = tuple[int, ...]
_Holding = tuple[str, _Numbers, int, tuple[tuple[_Numbers, _Numbers], ...]]


class _Keys(msgspec.Struct, array_like=True):
    """The keys of a rank's tensors: of each its kind, slot and parameter, as indices."""

    kinds: bytes
    slots: list[str | None]
    slot_numbers: bytes
    parameters: list[str]
    parameter_numbers: bytes


class _Body(msgspec.Struct, array_like=True):
    """A description without its rank. Ranks of meshes are differences of neighbours, which compress where ranks are in steps."""

    meshes: list[tuple[_Numbers, tuple[str, ...], bytes]]
    layouts: list[tuple[int, tuple[_Numbers, ...]]]
    holdings: list[_Holding]
    numbers: bytes


class _Message(msgspec.Struct, array_like=True):
    """Keys apart from the body, both compressed: what has the same bytes is read once."""

    rank: int
    keys: bytes
    body: bytes


def encode(description: RankDescription) -> bytes:
    """Bytes for the other ranks; each name, mesh, layout and holding is written once. What is equal, but for the rank, has equal bytes."""
    meshes: dict[Mesh, int] = {}
    layouts: dict[Layout, int] = {}
    holdings: dict[_Holding, int] = {}
    keys, held = _columns(description)
    alike = list(map(id, held))  # by identity first, which costs less
    known: dict[int, int] = {}
    for identity, holding in dict(zip(alike, held, strict=True)).items():
        layout = -1
        if holding.layout is not None:
            meshes.setdefault(holding.layout.mesh, len(meshes))
            layout = layouts.setdefault(holding.layout, len(layouts))
        boxes = tuple((region.offset, region.shape) for region in holding.regions)
        told = (holding.dtype.name, tuple(holding.global_shape), layout, boxes)
        known[identity] = holdings.setdefault(told, len(holdings))
    body = _Body(
        [(mesh.shape, mesh.axes, np.diff(np.array(mesh.ranks, "<i8"), prepend=0).tobytes()) for mesh in meshes],
        [(meshes[layout.mesh], layout.split) for layout in layouts],
        list(holdings),
        _pack(list(map(known.__getitem__, alike))),
    )
    return msgspec.msgpack.encode(_Message(description.rank, _compress(_encode_keys(keys)), _compress(body)))


def _compress(told: msgspec.Struct) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(told), _COMPRESSION)


def is_told_alike(first: RankDescription, second: RankDescription) -> bool:
    """Whether `encode` gives two descriptions the same bytes, found out at less than its cost."""
    (keys, one), (others, other) = _columns(first), _columns(second)
    if first.rank != second.rank or keys != others:
        return False
    # Each pair once, by identity.
    pairs = dict(zip(zip(map(id, one), map(id, other), strict=True), zip(one, other, strict=True), strict=True))
    return all(a == b for a, b in pairs.values())


def _columns(description: RankDescription) -> tuple[Sequence[TensorKey], Sequence[Holding]]:
    keys, held = zip(*description.tensors, strict=True) if description.tensors else ((), ())
    return keys, held


def _encode_keys(keys: Sequence[TensorKey]) -> _Keys:
    kinds = bytes([_KIND_NUMBERS[kind] for kind, _, _ in keys])
    slots, slot_numbers = _number([slot for _, slot, _ in keys])
    parameters, parameter_numbers = _number([parameter for _, _, parameter in keys])
    return _Keys(kinds, slots, _pack(slot_numbers), parameters, _pack(parameter_numbers))


def _number(values: Sequence[T]) -> tuple[list[T], Sequence[int] | np.ndarray]:
    """The different values in the order in which they come first, and of each value its number among them."""
    different = list(dict.fromkeys(values))
    if len(different) == len(values):
        return different, np.arange(len(values))
    numbers = {value: number for number, value in enumerate(different)}
    return different, list(map(numbers.__getitem__, values))


def decode(data: bytes) -> RankDescription:
    """The inverse of `encode`.

    Raises:
        CommunicationError: bytes that it didn't write.
    """
    return decode_all([data])[0]


def decode_all(texts: Sequence[bytes], own: RankDescription | None = None) -> list[RankDescription]:
    """The descriptions of several ranks. They share what they have in common: keys, meshes, layouts, holdings.

    Args:
        texts: what `encode` made of them.
        own: the one that this rank told, if it is among them: ranks with the same tensors get its keys, which need not be read.

    Raises:
        CommunicationError: bytes that `encode` didn't write.
    """
    reader = _Reader()
    decoder = msgspec.msgpack.Decoder(_Message)
    try:
        messages = [decoder.decode(text) for text in texts]
        for message in messages:
            if own is not None and message.rank == own.rank:
                reader.keys[message.keys] = tuple([key for key, _ in own.tensors])
        return [reader.read(message) for message in messages]
    except (msgspec.MsgspecError, zlib.error, ReshardError, LookupError, ValueError) as error:
        raise CommunicationError(
            "a rank's description can't be understood", found=str(error), fix="run the same version of reshard on every rank"
        ) from error


class _Reader:
    """Makes each thing once for all ranks.

    Attributes:
        keys: what is known, by what was told.
    """

    def __init__(self) -> None:
        self.keys: dict[bytes, tuple[TensorKey, ...]] = {}
        self._body = msgspec.msgpack.Decoder(_Body)
        self._tables: dict[tuple[bytes, bytes], TensorTable] = {}
        self._meshes: dict[tuple[_Numbers, tuple[str, ...], bytes], Mesh] = {}
        self._layouts: dict[tuple[int, tuple[_Numbers, ...]], Layout] = {}
        self._regions: dict[tuple[_Numbers, _Numbers], Region] = {}
        self._holdings: dict[tuple[object, ...], Holding] = {}

    def read(self, message: _Message) -> RankDescription:
        tensors = self._tables.get((message.keys, message.body))
        if tensors is None:
            tensors = self._tables[message.keys, message.body] = self._read_table(message)
        return RankDescription(message.rank, tensors)

    def _read_table(self, message: _Message) -> TensorTable:
        body = self._body.decode(zlib.decompress(message.body))
        keys = self.keys.get(message.keys)
        if keys is None:
            keys = self.keys[message.keys] = _decode_keys(zlib.decompress(message.keys))
        meshes = [self._mesh(mesh) for mesh in body.meshes]
        layouts = [self._layout(meshes[mesh], split) for mesh, split in body.layouts]
        holdings = []
        for dtype, shape, number, boxes in body.holdings:
            layout = None if number < 0 else layouts[number]
            known = (dtype, shape, id(layout), boxes)  # this reader keeps the layouts
            holding = self._holdings.get(known)
            if holding is None:
                regions = tuple(self._region(box) for box in boxes)
                holding = self._holdings[known] = Holding(by_name(dtype), shape, layout, regions)
            holdings.append(holding)
        numbers = _unpack(body.numbers)
        if len(numbers) != len(keys) or numbers.max(initial=0) >= max(1, len(holdings)):
            raise ValueError("tensors without a holding")
        return TensorTable(keys, tuple(holdings), numbers)

    def _mesh(self, told: tuple[_Numbers, tuple[str, ...], bytes]) -> Mesh:
        mesh = self._meshes.get(told)
        if mesh is None:
            shape, axes, steps = told
            mesh = self._meshes[told] = Mesh(shape, axes, tuple(np.cumsum(np.frombuffer(steps, "<i8")).tolist()))
        return mesh

    def _layout(self, mesh: Mesh, split: tuple[_Numbers, ...]) -> Layout:
        layout = self._layouts.get((id(mesh), split))
        if layout is None:
            layout = self._layouts[id(mesh), split] = Layout(mesh, split)
        return layout

    def _region(self, box: tuple[_Numbers, _Numbers]) -> Region:
        region = self._regions.get(box)
        if region is None:
            region = self._regions[box] = Region(*box)
        return region


def _decode_keys(data: bytes) -> tuple[TensorKey, ...]:
    keys = msgspec.msgpack.decode(data, type=_Keys)
    slots, parameters = _unpack(keys.slot_numbers).tolist(), _unpack(keys.parameter_numbers).tolist()
    if not len(keys.kinds) == len(slots) == len(parameters):
        raise ValueError("keys without a kind, a slot or a parameter")
    named = map(keys.slots.__getitem__, slots), map(keys.parameters.__getitem__, parameters)
    return tuple(rows(TensorKey, map(_KINDS.__getitem__, keys.kinds), *named))


def _pack(numbers: Sequence[int] | np.ndarray) -> bytes:
    return np.array(numbers, "<u4").tobytes()


def _unpack(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<u4")
