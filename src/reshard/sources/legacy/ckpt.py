"""A `.ckpt` file of `mindspore.save_checkpoint`: tensors one after the other, as messages of Protocol Buffers.

Each is a message of its own, and the file is all of them, joined. A tensor of more than 512 MiB is several messages of one name, each with
the whole shape and some of the bytes. Source: `mindspore/train/serialization.py` and `checkpoint.proto`, MindSpore 2.0 to 2.10.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from reshard.errors import DamagedCheckpointError
from reshard.format.names import is_tensor_name
from reshard.geometry import Region
from reshard.geometry.dtypes import by_mindspore
from reshard.sources.legacy.saved_file import FileTensor, Part, SavedFile, boxes_in_order
from reshard.sources.legacy.wire import BYTES, Field, Messages
from reshard.state import Kind
from reshard.storage import ReadableFile

FIRST_BYTE = b"\x0a"
"""What such a file begins with: field 1, of bytes."""

# The numbers of `checkpoint.proto`.
_VALUE = 1
_TAG, _TENSOR, _MAP = 1, 2, 3
_DIMS, _TYPE, _CONTENT = 1, 2, 3

# With `crc_check` this word and 10 bytes follow the last message: a CRC32 of all before it.
_CRC_WORD = b"crc_num"
_CRC_BYTES = len(_CRC_WORD) + 10

# What `enc_key` gives begins with one of these numbers, little-endian: AES-GCM, AES-CBC, SM4-CBC.
_CIPHERS = {0x7F3A5ED8: "AES-GCM", 0x7F3A5ED9: "AES-CBC", 0x7F3A5EDA: "SM4-CBC"}

# Far more than the names of tensors and of types have; a value that is text is a name or a path.
_MOST_NAME_BYTES = 1 << 16
_MOST_TYPE_BYTES = 64
_MOST_TEXT_BYTES = 1 << 20
# numpy's limits; also an empty tensor is held to them, whose other dimensions no bytes keep in bounds.
_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 2**60
# A state of 100,000 parameters has 3 tensors for each.
_MOST_MESSAGES = 4_000_000

_WHAT = "what mindspore.save_checkpoint writes"
_TEXT = "str"


def read_ckpt(file: ReadableFile, name: str, rank: int) -> SavedFile:
    """What such a file holds: the names, types and shapes are read, of the tensors' bytes nothing.

    Args:
        file: the open file.
        name: its name in the checkpoint's directory.
        rank: that wrote it.

    Raises:
        DataFileError: it is no such file, encrypted, or damaged.
        StorageError: the storage refuses.
    """
    messages = Messages(file, _WHAT)
    end, notes = _end_of(messages)
    reading = _Reading(messages)
    for number, value in enumerate(messages.fields(0, end)):
        if value.number != _VALUE or value.kind != BYTES or number >= _MOST_MESSAGES:
            raise messages.bad(f"field {value.number} of kind {value.kind} before byte {value.end}", "a named tensor")
        reading.take(value)
    reading.finish()
    return SavedFile(name, rank, reading.tensors, reading.texts, tuple(reading.left_out), notes)


def cipher_of(start: bytes) -> str | None:
    """The cipher of an encrypted file by its first four bytes; None for one that isn't encrypted."""
    return _CIPHERS.get(int.from_bytes(start[:4], "little")) if len(start) >= 4 else None


def _end_of(messages: Messages) -> tuple[int, tuple[str, ...]]:
    """Where the last message ends, and what follows it."""
    begin = messages.size - _CRC_BYTES
    if begin < 0 or messages.read(begin, len(_CRC_WORD)) != _CRC_WORD:
        return messages.size, ()
    return begin, ("the CRC32 at the end of a .ckpt file is of all its bytes at once: a load, which reads parts, doesn't check it",)


class _Message(NamedTuple):
    """One message: a tensor, or some of its bytes."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    content: Field | None


@dataclass
class _Reading:
    """What was understood so far."""

    messages: Messages
    tensors: dict[str, FileTensor] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    begun: list[_Message] = field(default_factory=list)

    def take(self, value: Field) -> None:
        """A message; those of one name that follow each other are one tensor."""
        message = self._message(value)
        if self.begun and message.name == self.begun[0].name:
            first = self.begun[0]
            if (message.type_name, message.shape) != (first.type_name, first.shape):
                raise self._bad(message, f"{message.type_name} of shape {list(message.shape)}", f"as before, {_words(first)}")
        else:
            self.finish()
        self.begun.append(message)

    def finish(self) -> None:
        """The tensor that was begun has all its messages."""
        if not self.begun:
            return
        first = self.begun[0]
        if first.name in self.names:
            raise self._bad(first, "two tensors of one name", "different names")
        self.names.add(first.name)
        if first.type_name == _TEXT:
            self.texts[first.name] = self._text()
        elif first.content is None:
            self.left_out.append(f"{first.name} (a MapParameter)")
        else:
            self._tensor(first)
        self.begun = []

    def _message(self, value: Field) -> _Message:
        tag: str | None = None
        tensor: Field | None = None
        is_map = False
        for part in self.messages.fields(value.begin, value.end):
            if part.number == _TAG and tag is None:
                tag = self.messages.text(part, _MOST_NAME_BYTES)
            elif part.number == _TENSOR and tensor is None:
                self.messages.check_bytes(part)
                tensor = part
            elif part.number == _MAP:
                is_map = True
            else:
                raise self.messages.bad(f"field {part.number} before byte {part.end}, in a named tensor", "a name and a tensor")
        if tag is None or (tensor is None) != is_map or not is_tensor_name(tag, Kind.MODEL):
            raise self.messages.bad(f"a message without a name or a tensor at byte {value.begin}", "a named tensor", tag)
        return _Message(tag, "", (), None) if tensor is None else self._tensor_message(tag, tensor)

    def _tensor_message(self, tag: str, tensor: Field) -> _Message:
        shape: list[int] = []
        type_name: str | None = None
        content: Field | None = None
        for part in self.messages.fields(tensor.begin, tensor.end):
            if part.number == _DIMS:
                shape += self.messages.integers(part)
            elif part.number == _TYPE and type_name is None:
                type_name = self.messages.text(part, _MOST_TYPE_BYTES)
            elif part.number == _CONTENT and content is None:
                self.messages.check_bytes(part)
                content = part
            else:
                raise self.messages.bad(f"field {part.number} before byte {part.end}, in a tensor", "dimensions, a type and bytes", tag)
        if type_name is None or content is None:
            raise self.messages.bad(f"a tensor without {'a type' if type_name is None else 'bytes'}", "dimensions, a type and bytes", tag)
        if len(shape) > _MOST_DIMENSIONS or min(shape, default=0) < 0 or prod(max(extent, 1) for extent in shape) >= _MOST_ELEMENTS:
            raise self.messages.bad(f"the shape {reprlib.repr(shape)}", "dimensions that a tensor can have", tag)
        return _Message(tag, type_name, tuple(shape), content)

    def _tensor(self, first: _Message) -> None:
        contents = [message.content for message in self.begun if message.content is not None]
        dtype = by_mindspore(first.type_name)
        if dtype is None:
            self.left_out.append(f"{first.name} ({first.type_name})")
            return
        found = sum(content.end - content.begin for content in contents)
        # A scalar had this shape, before MindSpore wrote none at all.
        shape = () if first.shape == (0,) and found == dtype.itemsize else first.shape
        if found != dtype.itemsize * prod(shape):
            raise self._bad(first, f"{found} bytes", f"{dtype.itemsize * prod(shape)} for {_words(first)}")
        if not found:
            self.tensors[first.name] = FileTensor(dtype, shape, (Part(Region.whole(shape), contents[0].begin),))
            return
        parts: list[Part] = []
        done = 0
        for content in contents:
            count, rest = divmod(content.end - content.begin, dtype.itemsize)
            if rest:
                raise self._bad(first, f"{content.end - content.begin} bytes in one message", f"whole elements of {dtype.itemsize} bytes")
            begin = content.begin
            for box in boxes_in_order(shape, done, count) if count else ():
                parts.append(Part(box, begin))
                begin += box.size * dtype.itemsize
            done += count
        self.tensors[first.name] = FileTensor(dtype, shape, tuple(parts))

    def _text(self) -> str:
        """A value that is text: numpy's, four bytes a character."""
        content = self.begun[0].content
        if len(self.begun) > 1 or content is None:
            raise self._bad(self.begun[0], f"text in {len(self.begun)} messages", "one")
        data = self.messages.bytes(content, _MOST_TEXT_BYTES)
        try:
            return data.decode("utf-32-le").rstrip("\0")
        except UnicodeDecodeError as cause:
            raise self._bad(self.begun[0], f"text that is none: {cause}", "four bytes a character") from cause

    def _bad(self, message: _Message, found: str, expected: str) -> DamagedCheckpointError:
        return self.messages.bad(found, expected, message.name)


def _words(message: _Message) -> str:
    return f"{message.type_name} of shape {list(message.shape)}"
