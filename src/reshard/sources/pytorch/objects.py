"""The objects in what PyTorch writes: tensors as where they lie in a storage, and the plain things around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reshard.geometry import DType
from reshard.geometry.dtypes import by_name
from reshard.sources.pytorch.vocabulary import Vocabulary, Word

# Sizes above are nobody's; sums of two stay inside 64 bits.
_MOST = 2**60

# Deeper than any state of a run, far from the interpreter's own limit.
MAX_DEPTH = 64

# torch's classes of storages with an element type.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
}

# torch's element types that checkpoints can hold; others become words that no tensor here has.
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "bool"),
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
)
_OTHER_DTYPES = ("complex128", "complex32", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "quint8", "qint8", "qint32")


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage of a `torch.save` file.

    Attributes:
        key: the name of its record.
        dtype: the element type; None for bytes of no type.
        numel: how many elements (of bytes of no type: bytes) the pickle says it has.
    """

    key: str
    dtype: DType | None
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of a `torch.save` file: where its elements lie in a storage.

    Attributes:
        storage: the storage.
        dtype: the element type.
        shape: its shape.
        strides: in elements.
        offset: its first element in the storage, in elements.
        is_parameter: whether it was saved as a parameter.
    """

    storage: StorageRef
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    is_parameter: bool = False

    @property
    def nbytes(self) -> int:
        """The bytes of its elements."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def begin(self) -> int:
        """Where it begins, in bytes from the begin of its storage."""
        return self.offset * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, in row-major order."""
        if 0 in self.shape:
            return True
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True


def torch_dtype_of(word: Any) -> DType | None:
    """The element type that a word like `torch.float32` means; None for one that checkpoints don't hold."""
    name = word.name.removeprefix("torch.") if type(word) is Word else None
    return by_name(name) if name in _DTYPES else None


def extent_of(value: Any) -> tuple[int, ...]:
    """A shape, an offset or strides.

    Raises:
        ValueError: not a tuple of numbers that a file can have.
    """
    if type(value) is tuple and len(value) <= MAX_DEPTH and all(type(item) is int and 0 <= item < _MOST for item in value):
        return value
    raise ValueError("sizes that no tensor has")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: DType | None) -> TensorRef:
    shape, strides, (offset,) = extent_of(shape), extent_of(strides), extent_of((offset,))
    if type(storage) is not StorageRef or len(shape) != len(strides):
        raise ValueError("a tensor without storage, or whose shape and strides don't fit together")
    if dtype is None:
        raise ValueError("an element type that checkpoints don't hold")
    last = offset + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    held = storage.numel if storage.dtype is not None else storage.numel // dtype.itemsize
    if 0 not in shape and last >= held:
        raise ValueError(f"a tensor of shape {list(shape)} that reaches beyond its storage of {held} elements")
    return TensorRef(storage, dtype, shape, strides, offset)


def _rebuild_tensor(arguments: tuple[Any, ...]) -> TensorRef:
    """`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None)`."""
    storage, offset, shape, strides, *_ = arguments
    return _tensor(storage, offset, shape, strides, storage.dtype if type(storage) is StorageRef else None)


def _rebuild_typed_tensor(arguments: tuple[Any, ...]) -> TensorRef:
    """`torch._utils._rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None)`."""
    storage, offset, shape, strides, _, _, dtype, *_ = arguments
    return _tensor(storage, offset, shape, strides, torch_dtype_of(dtype))


def _rebuild_parameter(arguments: tuple[Any, ...]) -> TensorRef:
    """`torch._utils._rebuild_parameter(data, requires_grad, hooks)`, and the same with a state."""
    data = arguments[0]
    if type(data) is not TensorRef:
        raise ValueError("a parameter that is no tensor")
    return TensorRef(data.storage, data.dtype, data.shape, data.strides, data.offset, is_parameter=True)


def _rebuild_with_attributes(arguments: tuple[Any, ...]) -> TensorRef:
    """`torch._tensor._rebuild_from_type_v2(function, type, arguments, state)`: a tensor with attributes, which are left out."""
    function, kind, inner, _ = arguments
    rebuild = _TENSORS.get(function.name) if type(function) is Word else None
    if rebuild is None or type(kind) is not Word or type(inner) is not tuple:
        raise ValueError("a tensor of a class of its own")
    return rebuild(inner)


def _storage(identity: Any) -> StorageRef:
    """A persistent id: `("storage", class, key, location, number of elements)`."""
    tag, kind, key, _, numel = identity
    if tag != "storage" or type(kind) is not Word or type(key) is not str:
        raise ValueError("a persistent id that is no storage")
    (numel,) = extent_of((numel,))
    name = _STORAGES.get(kind.name.rpartition(".")[2])
    return StorageRef(key, None if name is None else by_name(name), numel)


def _dictionary(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """`OrderedDict()`, also of a list of pairs."""
    if not arguments:
        return {}
    (pairs,) = arguments
    made = {}
    for key, value in pairs:
        if type(key) not in (str, int):
            raise ValueError("a key that is neither a text nor a number")
        made[key] = value
    return made


def _octets(arguments: tuple[Any, ...]) -> bytes:
    """`_codecs.encode(text, "latin1")`: bytes, in protocol 2."""
    text, encoding = arguments
    if type(text) is not str or encoding != "latin1":
        raise ValueError("bytes in another encoding")
    return text.encode("latin1")


def _path(arguments: tuple[Any, ...]) -> str:
    if not all(type(part) is str for part in arguments):
        raise ValueError("a path of something else than texts")
    return "/".join(arguments)


def _text(arguments: tuple[Any, ...]) -> str:
    """`torch.device("cuda", 0)`, `_get_layout("torch.strided")`."""
    return ":".join(part if type(part) is str else str(*extent_of((part,))) for part in arguments)


def _sizes(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    (sizes,) = arguments
    return extent_of(tuple(sizes))


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    items = arguments[0] if arguments else []
    if type(items) is not list or not all(type(item) in (str, int, float, bool, bytes, type(None)) for item in items):
        raise ValueError("a set of something else than plain values")
    return set(items)


_TENSORS: dict[str, Callable[[tuple[Any, ...]], TensorRef]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_with_attributes,
}

TORCH_OBJECTS = Vocabulary(
    functions={
        **_TENSORS,
        "collections.OrderedDict": _dictionary,
        "_codecs.encode": _octets,
        "builtins.set": _set,
        "torch.Size": _sizes,
        "torch.device": _text,
        "torch.serialization._get_layout": _text,
        "pathlib.PosixPath": _path,
        "pathlib.PurePosixPath": _path,
        "pathlib.WindowsPath": _path,
        "pathlib._local.PosixPath": _path,
        "pathlib._local.WindowsPath": _path,
    },
    words=frozenset(
        {
            *(f"torch.{name}" for name in (*_STORAGES, *_DTYPES, *_OTHER_DTYPES)),
            "torch.storage.UntypedStorage",
            "torch.UntypedStorage",
            "torch.Tensor",
            "torch.nn.parameter.Parameter",
            "torch.nn.parameter.Buffer",
            "torch.strided",
        }
    ),
    persistent=_storage,
)
"""What `torch.save` writes of tensors and plain values, as far as `torch.load(..., weights_only=True)` takes it."""
