"""The header of a safetensors file that is to be written: its bytes but for the digests, which come when the data is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from json.encoder import encode_basestring
from math import prod
from typing import NamedTuple, Protocol

from reshard.errors import CaptureError
from reshard.format.digest import DIGEST_DIGITS, DIGEST_NAME
from reshard.format.names import first_repeated
from reshard.format.row_blocks import row_blocks_of
from reshard.format.safetensors.header import MAX_TEXT_BYTES, METADATA, TensorEntry
from reshard.geometry import DType

# The reference implementation lays tensors out in this order of their types, so that each is aligned; and then by name. Here they stay in
# the order in which they are given, which is the state's and mostly that of its memory: to go through memory from its beginning to its end
# takes a fifth less time than to jump from layer 1 to layer 10.
_DTYPE_ORDER = ("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
_RANK = {code: rank for rank, code in enumerate(_DTYPE_ORDER)}


class Form(Protocol):
    """What has an element type and a shape."""

    @property
    def dtype(self) -> DType:
        """The element type."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        ...


class Kin(NamedTuple):
    """What tensors of one type and shape have in common in a file.

    Attributes:
        dtype: the element type.
        shape: the shape.
        nbytes: of each.
        block_bytes: of each of its row blocks; the last may have fewer.
        blocks: how many these are.
        text: what stands in the header between a tensor's name and its place.
    """

    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    block_bytes: int
    blocks: int
    text: str

    @classmethod
    def of(cls, dtype: DType, shape: tuple[int, ...]) -> Kin:
        """Of a type and a shape."""
        nbytes = dtype.itemsize * prod(shape)
        _, _, block_bytes, blocks = row_blocks_of(shape, dtype.itemsize)
        extents = ",".join(map(str, shape))
        text = f'":{{"dtype":"{dtype.safetensors}","shape":[{extents}],"data_offsets":['
        return cls(dtype, tuple(shape), nbytes, block_bytes, blocks, text)


@dataclass(frozen=True)
class PlannedHeader:
    """The header of a file that is to be written.

    Attributes:
        names: of the tensors, in the order of their bytes.
        kin: of each tensor what it has in common with others.
        nbytes: the bytes in front of the data: the length field and the padded text.
        file_size: the bytes of the whole file.
        blank: the bytes in front of the data, with zeros in the place of every digit of a digest.
        digests_at: where the digests begin in them; None for a file without.
        digests: how many there are.
    """

    names: Sequence[str]
    kin: Sequence[Kin]
    nbytes: int
    file_size: int
    blank: bytes
    digests_at: int | None
    digests: int

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The tensors by name, in the order of their bytes. Files are written without them: states have 100,000 tensors."""
        places = list(accumulate((kin.nbytes for kin in self.kin), initial=self.nbytes))
        placed = zip(self.names, self.kin, pairwise(places), strict=True)
        return {name: TensorEntry(name, kin.dtype, kin.shape, begin, end) for name, kin, (begin, end) in placed}

    def encode(self, digests: Sequence[bytes]) -> bytes:
        """The bytes in front of the data.

        Args:
            digests: of every row block of every tensor, in order; none for a file without.
        """
        at = self.digests_at
        if at is None:
            return self.blank
        digits = b"".join(digests).hex().encode()
        assert len(digits) == self.digests * DIGEST_DIGITS
        blank = memoryview(self.blank)
        return b"".join((blank[:at], digits, blank[at + len(digits) :]))


def plan_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str], *, digests: bool = True
) -> PlannedHeader:
    """The header of a file with these tensors: wider types first, and those of one width in the order in which they are given.

    Args:
        tensors: name, element type and shape of each.
        metadata: free text by key.
        digests: whether it has the digests of their row blocks.

    Raises:
        CaptureError: two tensors of one name, a name that can't be written, or more tensors than a header can hold.
    """
    # By identity: a hash of a type costs more.
    alike = [(id(dtype), shape) for _, dtype, shape in tensors]
    known = {key: Kin.of(dtype, shape) for key, (_, dtype, shape) in dict(zip(alike, tensors, strict=True)).items()}
    return plan_columns([name for name, _, _ in tensors], [known[key] for key in alike], metadata, digests=digests)


def plan_columns(names: Sequence[str], forms: Sequence[Form], metadata: Mapping[str, str], *, digests: bool = True) -> PlannedHeader:
    """What `plan_header` gives, for many tensors that are alike.

    Args:
        names: of the tensors.
        forms: what says the element type and the shape of each; tensors that are alike share one.
        metadata: as in `plan_header`.
        digests: likewise.

    Raises:
        CaptureError: as `plan_header`.
    """
    names, kin = _sort(names, forms)
    different = set(names)
    if len(different) != len(names) or METADATA in different:
        raise CaptureError("a file can't hold two tensors of one name, nor one named __metadata__", found=first_repeated(names) or METADATA)
    number = sum([alike.blocks for alike in kin])
    # Each tensor ends where the next begins, counted from the begin of the data.
    places = [0, *accumulate([alike.nbytes for alike in kin])]
    blank, at = _blank(_items(names, kin, places), metadata, DIGEST_DIGITS * number if digests else None)
    nbytes = len(blank)
    if nbytes > MAX_TEXT_BYTES:
        raise CaptureError(
            "more tensors than the header of one safetensors file can hold",
            found=f"{len(names)} tensors, a header of {nbytes} bytes",
            expected=f"at most {MAX_TEXT_BYTES} bytes",
            fix="save from more ranks, or stack small tensors",
        )
    return PlannedHeader(names, kin, nbytes, nbytes + places[-1], blank, at, number if digests else 0)


def _sort(names: Sequence[str], forms: Sequence[Form]) -> tuple[Sequence[str], list[Kin]]:
    """The names in the order of the file, and what each tensor has in common with others."""
    alike = list(map(id, forms))
    known = {identity: Kin.of(form.dtype, form.shape) for identity, form in dict(zip(alike, forms, strict=True)).items()}
    kin = list(map(known.__getitem__, alike))
    if len({one.dtype.safetensors for one in known.values()}) > 1:
        order = sorted(range(len(kin)), key=lambda number: _RANK[kin[number].dtype.safetensors])
        return [names[number] for number in order], [kin[number] for number in order]
    return names, kin


def _items(names: Sequence[str], kin: Sequence[Kin], places: Sequence[int]) -> list[str]:
    """The tensors' entries as text."""
    together = "".join(names)
    # What JSON spells otherwise are single characters, and nearly always there are none.
    spelled = names if encode_basestring(together) == f'"{together}"' else [encode_basestring(name)[1:-1] for name in names]
    texts, digits = [alike.text for alike in kin], list(map(str, places))
    return [f'"{name}{text}{begin},{end}]}}' for name, text, begin, end in zip(spelled, texts, digits, digits[1:], strict=False)]


def _blank(items: list[str], metadata: Mapping[str, str], digits: int | None) -> tuple[bytes, int | None]:
    """The bytes in front of the data, and where in them digests begin.

    Args:
        items: the tensors' entries, whose places are counted from the begin of the data.
        metadata: free text by key.
        digits: of the digests, for which there are zeros; None for a file without.
    """
    told = dict(metadata)
    if digits is not None:
        told.pop(DIGEST_NAME, None)
        told[DIGEST_NAME] = ""  # the last one, where its digits are put
    front, listed = "{", items
    if told:
        front = f'{{"{METADATA}":{json.dumps(told, ensure_ascii=False, separators=(",", ":"))}'
        # The digits go between the last two quotes. They, and a megabyte of entries, are copied as seldom as can be.
        end = "" if digits is None else front[-2:]
        front, listed = front.removesuffix(end), [end, *items]
    try:
        begin, rest = front.encode(), ",".join(listed).encode()
    except UnicodeEncodeError as cause:
        raise CaptureError(
            "a name that is no Unicode text can't be written", found=ascii(cause.object[cause.start : cause.end]), fix="rename the tensor"
        ) from cause
    nbytes = len(begin) + (digits or 0) + len(rest) + 1
    padding = -nbytes % 8
    length = (nbytes + padding).to_bytes(8, "little")
    blank = b"".join((length, begin, b"0" * (digits or 0), rest, b"}", b" " * padding))
    return blank, None if digits is None else len(length) + len(begin)
