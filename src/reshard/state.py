"""What one rank has to save, or to fill when it loads. Plain data and memory; no framework, no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

import numpy as np

from reshard.errors import CaptureError
from reshard.geometry import DType, Layout, Region
from reshard.geometry.dtypes import by_numpy


class Kind(str, Enum):
    """What a tensor belongs to; its value is the word in file names."""

    MODEL = "model"
    OPTIMIZER = "opt"


class TensorKey(NamedTuple):
    """What a tensor is. Its name in files is made in one place, `reshard.format.names`.

    Attributes:
        kind: model or optimizer.
        slot: for an optimizer tensor its part in the algorithm (`adam_m`); None for a model tensor.
        parameter: the global name of the parameter or buffer, without wrappers' parts; empty for an optimizer tensor that belongs to no
            parameter (`global_step`).
    """

    kind: Kind
    slot: str | None
    parameter: str


# To look a member up in its class takes half as long as to make a key.
_MODEL, _OPTIMIZER = Kind.MODEL, Kind.OPTIMIZER

GLOBAL_STEP = TensorKey(_OPTIMIZER, "global_step", "")


def model_key(parameter: str) -> TensorKey:
    """The key of a parameter or buffer of the model."""
    return TensorKey(_MODEL, None, parameter)


def slot_key(slot: str, parameter: str) -> TensorKey:
    """The key of an optimizer tensor of a parameter."""
    return TensorKey(_OPTIMIZER, slot, parameter)


class Memory(Protocol):
    """The memory that holds a shard on a rank: the host's, or an accelerator's.

    All arrays have the shard's shape and the numpy type of its dtype.
    """

    @property
    def nbytes(self) -> int:
        """The bytes of the shard, as the memory itself has them at present."""
        ...

    @property
    def host(self) -> np.ndarray | None:
        """A writable view of the memory itself (any strides), or None when the host can't address it."""
        ...

    @property
    def address(self) -> int | None:
        """Where the shard's bytes begin in this process, when they lie there one after the other; None when they don't.

        As long as the memory lives, all bytes of the shard may be written there. It costs less than a view: states have 100,000 tensors.
        """
        ...

    def read(self) -> np.ndarray:
        """The present values on the host: a view where there is one, else a copy."""
        ...

    def write(self, region: Region, values: np.ndarray) -> None:
        """Put values into a region, given in the shard's own coordinates."""
        ...

    def hold(self) -> Memory:
        """The same memory, whatever becomes of the object that it was taken from: that may be given other memory."""
        ...

    def begin_copy(self, target: np.ndarray) -> Callable[[], object] | None:
        """Begin to copy the present values to the host; what runs afterwards on the device must not change them before they are read.

        Args:
            target: where to.

        Returns:
            What to call before the target is looked at, from any thread, and more than once if need be; None when the values are there.
        """
        ...


@dataclass(frozen=True, slots=True)
class HostMemory:
    """A numpy array as the memory of a shard."""

    array: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    @property
    def host(self) -> np.ndarray | None:
        return self.array

    @property
    def address(self) -> int | None:
        return self.array.ctypes.data if self.array.flags.c_contiguous and self.array.flags.writeable else None

    def read(self) -> np.ndarray:
        return self.array

    def write(self, region: Region, values: np.ndarray) -> None:
        self.array[region.slices] = values

    def hold(self) -> Memory:
        return self

    def begin_copy(self, target: np.ndarray) -> None:
        target[...] = self.array


class Shard(NamedTuple):
    """A region together with the memory that holds it on this rank."""

    region: Region
    memory: Memory


class ShardedTensor(NamedTuple):
    """This rank's part of a global tensor.

    Attributes:
        key: what it is.
        dtype: the element type.
        global_shape: the shape of the whole tensor.
        layout: how the whole lies on its mesh; None when no layout can say it, or when it isn't on a mesh (then this rank's shards are all
            that is known).
        shards: what this rank holds; none, one (the usual case) or several disjoint regions.
    """

    key: TensorKey
    dtype: DType
    global_shape: tuple[int, ...]
    layout: Layout | None
    shards: tuple[Shard, ...]

    @property
    def nbytes(self) -> int:
        """The bytes that this rank holds."""
        return self.dtype.itemsize * sum(shard.region.size for shard in self.shards)


def whole_tensor(key: TensorKey, array: np.ndarray, layout: Layout | None = None) -> ShardedTensor:
    """A tensor that this rank holds whole.

    Raises:
        UsageError: a numpy type that checkpoints don't hold.
    """
    return ShardedTensor(key, by_numpy(array.dtype), array.shape, layout, (Shard(Region.whole(array.shape), HostMemory(array)),))


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Hyper-parameters, kept by parameter name: pipeline stages see only parts of a group, and its index means nothing elsewhere.

    Attributes:
        options: the hyper-parameters (`lr`, `betas`, …): values of JSON, tuples, arrays.
        parameters: the names of this rank's parameters that they hold for.
        unstepped: those of them for which the optimizer has no state yet (frozen, or never had a gradient).
    """

    options: Mapping[str, Any]
    parameters: tuple[str, ...]
    unstepped: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """What one rank has to save, or to fill.

    Attributes:
        tensors: sharded tensors by key, in the order of the model.
        groups: the optimizers' hyper-parameters.
        values: global values (scheduler, data position, extras): trees of JSON values, tuples, bytes and arrays, the same on every rank;
            rank 0's are stored.
        rank_values: per-rank values (random states): such trees, each rank's own are stored.
        updated: the tensors that nothing but an optimizer's step changes (its parameters and their slots), as far as that is known.
    """

    tensors: Mapping[TensorKey, ShardedTensor] = field(default_factory=dict)
    groups: tuple[ParameterGroup, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    rank_values: Mapping[str, Any] = field(default_factory=dict)
    updated: frozenset[TensorKey] = frozenset()


def state_of(*tensors: ShardedTensor, **fields: Any) -> State:
    """A state of these tensors.

    Raises:
        CaptureError: two tensors under one key.
    """
    by_key: dict[TensorKey, ShardedTensor] = {}
    for tensor in tensors:
        if tensor.key in by_key:
            raise CaptureError("two tensors of one state have the same name", tensor=tensor.key)
        by_key[tensor.key] = tensor
    return State(tensors=by_key, **fields)
