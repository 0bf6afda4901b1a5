"""Pickles as data: a machine that builds plain values and knows a few words, and that calls nothing a file names.

A pickle is a program for a stack machine. Python's own machine imports what the program names and calls it. This one has the
instructions that build values, and a list of names: what is on it stands for a function of ours or becomes a record; anything else is
an error. So no file can run anything, whatever it says; and what it can make this process hold is bounded by its own length.

Source of the instructions: the documentation in `Lib/pickletools.py` of Python 3.14. Protocols 2 to 5, as far as `torch.save` and
`torch.distributed.checkpoint` use them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from reshard.errors import DataFileError
from reshard.sources.pytorch.vocabulary import Record, UnknownNameError, Vocabulary, Word

# A pickle's integers are sizes, counts and keys; Python takes quadratic time for the digits of long ones.
_MOST_INTEGER_BYTES = 32

_NOT_ONE = "not a pickle that can be read, or a damaged one"
_DAMAGED = "the file is damaged, or another program's: restore it from a copy"
_REFUSED = (
    "if you trust whoever wrote it, open it in PyTorch with weights_only=False and save its tensors and plain values alone; "
    "if you don't, delete it"
)


def read_pickle(data: bytes, vocabulary: Vocabulary, path: str) -> Any:
    """The value that a pickle describes.

    Containers may be shared, and may contain themselves: whoever walks them bounds the walk.

    Args:
        data: the pickle; what follows its end is not looked at.
        vocabulary: what it may name.
        path: the file, for errors.

    Raises:
        UnknownNameError: it names something else; nothing was called.
        DataFileError: it is no such pickle.
    """
    machine = _Machine(data, vocabulary, path)
    try:
        return machine.run()
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error, RecursionError) as cause:
        # What goes wrong inside an instruction: too few values on the stack, the end of the data, a value of another kind.
        raise DataFileError(
            _NOT_ONE, file=path, found=f"{type(cause).__name__} at byte {machine.at}: {str(cause)[:200]}", fix=_DAMAGED
        ) from None


# What marks a place on the stack.
_MARK = object()


class _Machine:
    """The stack, the memo, and an instruction per method.

    Attributes:
        at: the byte that is looked at.
    """

    def __init__(self, data: bytes, vocabulary: Vocabulary, path: str) -> None:
        self.at = 0
        self._data = data
        self._path = path
        self._known = vocabulary
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._names: dict[tuple[str, str], Word] = {}

    def run(self) -> Any:
        instructions, data = _INSTRUCTIONS, self._data
        if data[:1] != b"\x80":
            raise DataFileError(_NOT_ONE, file=self._path, found="no protocol at its begin", expected="protocol 2 or later", fix=_DAMAGED)
        while True:
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return self._stack.pop()
            instruction = instructions[code]
            if instruction is None:
                raise self._unknown_instruction(code)
            instruction(self)

    def _unknown_instruction(self, code: int) -> DataFileError:
        return DataFileError(
            "a pickle with an instruction that isn't taken from files",
            file=self._path,
            found=f"{bytes([code])!r} at byte {self.at - 1}",
            expected="what torch.save writes",
            fix=_REFUSED,
        )

    def _take(self, nbytes: int) -> bytes:
        begin = self.at
        end = begin + nbytes
        if end > len(self._data):
            raise ValueError(f"{nbytes} bytes are promised and {len(self._data) - begin} are left")
        self.at = end
        return self._data[begin:end]

    def _number(self, nbytes: int) -> int:
        return int.from_bytes(self._take(nbytes), "little")

    def _line(self) -> str:
        end = self._data.index(b"\n", self.at)
        text = self._data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    # Plain values

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def protocol(self) -> None:
        found = self._number(1)
        if not 2 <= found <= 5:
            raise ValueError(f"protocol {found}; 2 to 5 are known")

    def frame(self) -> None:
        # A hint for readers of streams.
        if self._number(8) > len(self._data) - self.at:
            raise ValueError("a frame that is longer than the data")

    def small_integer(self) -> None:
        self._stack.append(self._number(1))

    def short_integer(self) -> None:
        self._stack.append(self._number(2))

    def integer(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def long_integer(self) -> None:
        nbytes = self._number(1)
        if nbytes > _MOST_INTEGER_BYTES:
            raise ValueError(f"an integer of {nbytes} bytes")
        self._stack.append(int.from_bytes(self._take(nbytes), "little", signed=True))

    def real(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def text(self, width: int) -> None:
        self._stack.append(self._take(self._number(width)).decode("utf-8", "surrogatepass"))

    def octets(self, width: int) -> None:
        self._stack.append(self._take(self._number(width)))

    # Containers

    def mark(self) -> None:
        self._stack.append(_MARK)

    def _since_mark(self) -> list[Any]:
        """What was put on the stack since the last mark; both go."""
        stack = self._stack
        place = len(stack) - 1
        while stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("no mark on the stack")
        items = stack[place + 1 :]
        del stack[place:]
        return items

    def tuple_since_mark(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def tuple_of(self, count: int) -> None:
        stack = self._stack
        items = tuple(stack[-count:])
        if len(items) < count or _MARK in items:
            raise ValueError("too few values on the stack")
        del stack[-count:]
        stack.append(items)

    def append(self) -> None:
        value = self._stack.pop()
        self._top(list).append(value)

    def append_many(self) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def set_item(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._top(dict)[_as_key(key)] = value

    def set_many(self) -> None:
        items = self._since_mark()
        if len(items) % 2:
            raise ValueError("a key without a value")
        target = self._top(dict)
        for index in range(0, len(items), 2):
            target[_as_key(items[index])] = items[index + 1]

    def add_many(self) -> None:
        items = self._since_mark()
        self._top(set).update(map(_as_key, items))

    def frozen_set(self) -> None:
        self._stack.append(frozenset(map(_as_key, self._since_mark())))

    def _top(self, kind: type) -> Any:
        top = self._stack[-1]
        if type(top) is not kind:
            raise TypeError(f"a {kind.__name__} is expected, not a {type(top).__name__}")
        return top

    # The stack and the memo

    def pop(self) -> None:
        self._stack.pop()

    def pop_mark(self) -> None:
        self._since_mark()

    def duplicate(self) -> None:
        self._stack.append(self._stack[-1])

    def recall(self, width: int) -> None:
        self._stack.append(self._memo[self._number(width)])

    def keep(self, width: int) -> None:
        index = self._number(width)
        if index > len(self._data):
            raise ValueError(f"a memo of {index} values in a pickle of {len(self._data)} bytes")
        self._memo[index] = self._stack[-1]

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    # Names

    def named(self) -> None:
        module = self._line()
        self._stack.append(self._word(module, self._line()))

    def named_on_stack(self) -> None:
        name = self._stack.pop()
        module = self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("a name that is no text")
        self._stack.append(self._word(module, name))

    def _word(self, module: str, name: str) -> Word:
        word = self._names.get((module, name))
        if word is None:
            # Protocol 2 has Python 2's name of the module.
            full = f"{'builtins' if module == '__builtin__' else module}.{name}"
            if not self._known.knows(full):
                raise UnknownNameError(
                    "the file names something that is neither a tensor nor a plain value; nothing of it was run",
                    file=self._path,
                    found=full[:200],
                    expected="tensors, numbers, texts, lists, dictionaries",
                    fix=_REFUSED,
                )
            word = self._names[module, name] = Word(full)
        return word

    def call(self) -> None:
        arguments = self._stack.pop()
        called = self._stack.pop()
        if type(called) is not Word or type(arguments) is not tuple:
            raise TypeError("a call of something that is no name")
        function = self._known.functions.get(called.name)
        if function is not None:
            self._stack.append(function(arguments))
        elif called.name in self._known.records:
            self._stack.append(Record(called.name, arguments))
        else:
            raise TypeError(f"a call of {called.name}")

    def build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is dict:
            # An ordered dictionary's attributes: of a state dictionary the versions of its modules. They are no values of a run.
            return
        if type(target) is not Record:
            raise TypeError(f"a state for a {type(target).__name__}")
        # With slots it is a pair: none, and the fields.
        if type(state) is tuple and len(state) == 2 and state[0] is None:
            state = state[1]
        if type(state) is dict and all(type(key) is str for key in state):
            target.fields = state
        else:
            target.state = state

    def persistent(self) -> None:
        if self._known.persistent is None:
            raise TypeError("a persistent id, where there can be none")
        self._stack.append(self._known.persistent(self._stack.pop()))


_PLAIN_KEYS = (str, int, float, bool, bytes, type(None), Record)


def _as_key(value: Any) -> Any:
    """A value that may be a key: hashing it costs little, however the file nests tuples."""
    kind = type(value)
    if kind in _PLAIN_KEYS or (kind in (tuple, Word) and (kind is Word or all(type(item) in _PLAIN_KEYS for item in value))):
        return value
    raise TypeError(f"a key that is a {kind.__name__}")


def _pushing(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(make())


_STOP = ord(".")

_BY_CODE: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"N": _pushing(lambda: None),
    b"\x88": _pushing(lambda: True),
    b"\x89": _pushing(lambda: False),
    b"K": _Machine.small_integer,
    b"M": _Machine.short_integer,
    b"J": _Machine.integer,
    b"\x8a": _Machine.long_integer,
    b"G": _Machine.real,
    b"\x8c": lambda machine: machine.text(1),
    b"X": lambda machine: machine.text(4),
    b"\x8d": lambda machine: machine.text(8),
    b"C": lambda machine: machine.octets(1),
    b"B": lambda machine: machine.octets(4),
    b"\x8e": lambda machine: machine.octets(8),
    b"]": _pushing(list),
    b"}": _pushing(dict),
    b"\x8f": _pushing(set),
    b")": _pushing(tuple),
    b"(": _Machine.mark,
    b"t": _Machine.tuple_since_mark,
    b"\x85": lambda machine: machine.tuple_of(1),
    b"\x86": lambda machine: machine.tuple_of(2),
    b"\x87": lambda machine: machine.tuple_of(3),
    b"a": _Machine.append,
    b"e": _Machine.append_many,
    b"s": _Machine.set_item,
    b"u": _Machine.set_many,
    b"\x90": _Machine.add_many,
    b"\x91": _Machine.frozen_set,
    b"0": _Machine.pop,
    b"1": _Machine.pop_mark,
    b"2": _Machine.duplicate,
    b"h": lambda machine: machine.recall(1),
    b"j": lambda machine: machine.recall(4),
    b"q": lambda machine: machine.keep(1),
    b"r": lambda machine: machine.keep(4),
    b"\x94": _Machine.memoize,
    b"c": _Machine.named,
    b"\x93": _Machine.named_on_stack,
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
}

_INSTRUCTIONS: list[Callable[[_Machine], None] | None] = [_BY_CODE.get(bytes([code])) for code in range(256)]
