"""One tensor's entry in `metadata.json`: dtype, shape, layout and chunks, as text and as geometry.

Tensors of the same shape, dtype and layout have the same text, so that both directions work once per kind of tensor, not once per tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from reshard.errors import LayoutError, MetadataError
from reshard.format import json_text
from reshard.geometry import DType, Layout, Region
from reshard.geometry.cover import cover_fault
from reshard.geometry.dtypes import by_mindspore
from reshard.geometry.layout import INTERLEAVED_AXIS
from reshard.geometry.tensor_map import layout_from_tensor_map, replica_ids, slices_of, tensor_map_of

# The published reader unpacks a layout by position, so that the order of its keys is part of the contract.
_LAYOUT_KEYS = ["device_matrix", "tensor_map", "interleaved_parallel", "alias_name", "rank_list"]

# numpy's limit.
_MAX_DIMENSIONS = 64

_DAMAGED = "the metadata is damaged: restore it from a copy, or resume from another iteration"

_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Numbers = Annotated[list[_Number], msgspec.Meta(max_length=_MAX_DIMENSIONS)]
_Axis = Annotated[int, msgspec.Meta(ge=-1, lt=_MAX_DIMENSIONS)]


class _Properties(msgspec.Struct):
    dtype: str


class _Layout(msgspec.Struct):
    device_matrix: Annotated[list[Annotated[int, msgspec.Meta(ge=1, lt=2**31)]], msgspec.Meta(max_length=_MAX_DIMENSIONS)]
    tensor_map: Annotated[list[int | list[_Axis]], msgspec.Meta(max_length=_MAX_DIMENSIONS)]
    interleaved_parallel: bool
    alias_name: Annotated[list[str], msgspec.Meta(max_length=_MAX_DIMENSIONS)]
    rank_list: list[_Number]


class _Chunk(msgspec.Struct):
    global_offset: Annotated[list[_Number], msgspec.Meta(min_length=1, max_length=1)]
    local_shape: _Numbers
    offset: _Numbers | None = None


class _Parameter(msgspec.Struct):
    properties: _Properties
    global_shape: _Numbers
    axis_fragmentations: _Numbers
    layout: msgspec.Raw
    chunk: list[_Chunk]
    kind: str | None = None


_PARAMETER = msgspec.json.Decoder(_Parameter)
_LAYOUT = msgspec.json.Decoder(_Layout)


@dataclass(frozen=True)
class Parameter:
    """What an entry says, without the tensor's name.

    Attributes:
        dtype: the element type; None when the entry names one that isn't known here.
        dtype_name: the name that the entry gives it.
        global_shape: the shape of the whole tensor.
        layout: how it lies on its mesh, or None.
        slices: the region of each chunk, by slice id, in the entry's order.
        kind: what the tensor belongs to, where the entry says so (only when no file can tell).
    """

    dtype: DType | None
    dtype_name: str
    global_shape: tuple[int, ...]
    layout: Layout | None
    slices: Mapping[int, Region]
    kind: str | None = None


def encode_parameter(parameter: Parameter) -> str:
    """The entry as JSON, in the contract's order of keys; per chunk the true element `offset` besides.

    Several chunks without a layout are followed by one that is empty and stored nowhere; readers leave such chunks out.
    """
    layout = parameter.layout
    fields: dict[str, Any] = {
        "properties": {
            "dtype": parameter.dtype_name,
            "replica_id": 0 if layout is None else replica_ids(layout),
            "allow_shape_mismatch": False,
            "allow_to_save": True,
        },
        "global_shape": parameter.global_shape,
        "axis_fragmentations": [1] * len(parameter.global_shape) if layout is None else layout.fragments,
        "layout": None,
        "chunk": [_chunk(number, region) for number, region in parameter.slices.items()],
    }
    if layout is None and len(parameter.slices) > 1:
        # The published reader would take the first of these chunks for the whole tensor. It refuses a tensor with a chunk that is stored
        # nowhere ("Storage info not found"): one that holds nothing costs readers of offsets nothing.
        nothing = (0,) * len(parameter.global_shape)
        fields["chunk"].append(_chunk(max(parameter.slices) + 1, Region(nothing, nothing)))
    if layout is not None:
        values = (layout.mesh.shape, tensor_map_of(layout), INTERLEAVED_AXIS in layout.mesh.axes, layout.mesh.axes, layout.mesh.ranks)
        fields["layout"] = dict(zip(_LAYOUT_KEYS, values, strict=True))
    if parameter.kind is not None:
        fields["kind"] = parameter.kind
    return json.dumps(fields, separators=(",", ":"))


def _chunk(number: int, region: Region) -> dict[str, Any]:
    return {"global_offset": [number], "local_shape": region.shape, "offset": region.offset}


def number_slices(layout: Layout | None, global_shape: tuple[int, ...], regions: Sequence[Region]) -> list[int]:
    """The slice id under which the contract stores each of a tensor's chunks.

    Without a layout a single chunk has id 0, which means the whole tensor; several start at 1.

    Raises:
        LayoutError: the chunks are not those of the layout, or don't cover the tensor exactly once.
    """
    if layout is None:
        fault = cover_fault(regions, global_shape)
        if fault is not None:
            raise LayoutError("the chunks of a tensor don't cover it exactly once", found=fault)
        return list(range(len(regions))) if len(regions) == 1 else list(range(1, len(regions) + 1))
    # Of an empty tensor several slices are the same region: each chunk takes one of them.
    expected = slices_of(layout, global_shape)
    left: dict[Region, list[int]] = {}
    for number in reversed(expected):
        left.setdefault(expected[number], []).append(number)
    numbers = [left[region].pop() for region in regions if left.get(region)]
    if len(numbers) != len(regions) or _lacks(dict.fromkeys(numbers), expected, global_shape):
        raise LayoutError(
            "the chunks of a tensor are not the slices of its layout",
            found=f"{len(numbers)} of {len(regions)} chunks are",
            expected=f"{len(expected)} slices",
        )
    return numbers


def decode_parameter(text: bytes, name: str, file: str) -> Parameter:
    """What an entry says, checked in itself.

    Args:
        text: the entry's JSON.
        name: the tensor's name, for errors.
        file: the metadata file, for errors.

    Raises:
        MetadataError: the entry can't be understood, contradicts itself, or its chunks don't cover the tensor exactly once.
    """
    try:
        return _decode(text, file)
    except (MetadataError, LayoutError) as cause:
        if cause.tensor is not None:
            raise
        raise MetadataError(
            cause.what, file=file, tensor=name, field=cause.field, found=cause.found, expected=cause.expected, fix=cause.fix or _DAMAGED
        ) from cause


def _decode(text: bytes, file: str) -> Parameter:
    wire = json_text.decode(text, _PARAMETER, file)
    json_text.check_duplicate_keys(text, None, file)
    dtype = by_mindspore(wire.properties.dtype)
    shape = tuple(wire.global_shape)
    # Widest element: 8 bytes. No file is as large as 2**63 bytes, and the arithmetic on offsets stays in 64 bits.
    if math.prod(max(extent, 1) for extent in shape) >= 2**60:
        raise MetadataError("a tensor larger than any file", field="global_shape", found=list(shape))
    layout = _decode_layout(bytes(wire.layout), file)
    fragments = layout.fragments if layout is not None else (1,) * len(shape)
    if tuple(wire.axis_fragmentations) != fragments:
        raise MetadataError(
            "fragments contradict the layout", field="axis_fragmentations", found=wire.axis_fragmentations, expected=list(fragments)
        )
    numbers = [chunk.global_offset[0] for chunk in wire.chunk]
    if len(set(numbers)) != len(numbers):
        raise MetadataError("two chunks of a tensor have one slice id", field="global_offset", found=_some(numbers))
    slices = _free_slices(wire.chunk, shape) if layout is None else _layout_slices(wire.chunk, layout, shape)
    return Parameter(dtype, wire.properties.dtype, shape, layout, slices, wire.kind)


def _decode_layout(text: bytes, file: str) -> Layout | None:
    if text == b"null":
        return None
    wire = json_text.decode(text, _LAYOUT, file)
    keys = list(json.loads(text))
    if keys != _LAYOUT_KEYS:
        raise MetadataError("the keys of a layout are not in the contract's order", field="layout", found=keys, expected=_LAYOUT_KEYS)
    names = wire.alias_name
    if wire.interleaved_parallel != (INTERLEAVED_AXIS in names) or INTERLEAVED_AXIS in names[:-1]:
        raise MetadataError(
            f"interleaved_parallel is true exactly when the last axis is named {INTERLEAVED_AXIS!r}",
            field="interleaved_parallel",
            found=f"{wire.interleaved_parallel}, axes {names}",
        )
    return layout_from_tensor_map(wire.device_matrix, wire.tensor_map, names, wire.rank_list)


def _free_slices(chunks: list[_Chunk], shape: tuple[int, ...]) -> dict[int, Region]:
    slices = {}
    for chunk in chunks:
        offset = chunk.offset
        if offset is None:
            if len(chunks) > 1:
                raise MetadataError(
                    "several chunks without a layout, and one doesn't say where it lies", field="offset", found=chunk.global_offset
                )
            offset = [0] * len(shape)
        slices[chunk.global_offset[0]] = Region(tuple(offset), tuple(chunk.local_shape))
    fault = cover_fault(tuple(slices.values()), shape)
    if fault is not None:
        raise MetadataError(
            "the chunks of a tensor don't cover it exactly once", field="chunk", found=fault, expected=f"a tensor of {list(shape)}"
        )
    return slices


def _layout_slices(chunks: list[_Chunk], layout: Layout, shape: tuple[int, ...]) -> dict[int, Region]:
    if len(shape) != len(layout.split):
        raise MetadataError(
            "layout and shape have different numbers of dimensions", field="tensor_map", found=len(layout.split), expected=len(shape)
        )
    if not layout.is_even(shape):
        raise MetadataError(
            "a layout that doesn't split the tensor evenly",
            field="axis_fragmentations",
            found=list(layout.fragments),
            expected=f"divisors of {list(shape)}",
            fix="no layout of the contract can say this; rows may be missing from the files",
        )
    expected = slices_of(layout, shape)
    slices = {}
    for chunk in chunks:
        number = chunk.global_offset[0]
        region = expected.get(number)
        if region is None:
            raise MetadataError(
                "a chunk has a slice id that its layout doesn't have", field="global_offset", found=number, expected=_some(expected)
            )
        if tuple(chunk.local_shape) != region.shape:
            raise MetadataError(
                "a chunk's shape contradicts its layout", field="local_shape", found=chunk.local_shape, expected=list(region.shape)
            )
        if chunk.offset is not None and tuple(chunk.offset) != region.offset:
            raise MetadataError("a chunk's offset contradicts its layout", field="offset", found=chunk.offset, expected=list(region.offset))
        slices[number] = region
    missing = _lacks(slices, expected, shape)
    if missing:
        raise MetadataError("the chunks of a tensor don't cover it", field="chunk", found=f"no chunk for the slice ids {_some(missing)}")
    return slices


def _lacks(slices: Mapping[int, Any], expected: Mapping[int, Region], shape: tuple[int, ...]) -> list[int]:
    """The slice ids that are missing; of an empty tensor none is needed."""
    return [] if 0 in shape else [number for number in expected if number not in slices]


def _some(numbers: Mapping[int, Any] | list[int]) -> str:
    listed = sorted(numbers)
    return ", ".join(map(str, listed[:8])) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
