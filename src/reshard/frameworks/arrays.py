"""The adapter for plain dictionaries of numpy arrays: a run without a framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from reshard.catalog import Catalog
from reshard.comm import Communicator, SingleProcess
from reshard.errors import CaptureError, UsageError
from reshard.format.names import parse_tensor_name, tensor_name
from reshard.frameworks.host_random import host_random_states, reseed_host, restore_host_random_states
from reshard.state import GLOBAL_STEP, Kind, ParameterGroup, ShardedTensor, State, TensorKey, state_of, whole_tensor


class ArrayAdapter:
    """Dictionaries that give each name an array, or a `ShardedTensor` that says how the array lies on the ranks.

    The names are those in files: a parameter's for the model, `{slot}.{parameter}` and `global_step` for the optimizer. A plain
    array is a tensor that this rank holds whole. A name in the dictionary counts more than the key in a `ShardedTensor`. A list of such
    dictionaries is taken as one.
    """

    framework = "numpy"

    def capture(self, model: Any, optimizer: Any, *, global_step: int | None) -> State:
        tensors = [*_tensors(model, Kind.MODEL), *_tensors(optimizer, Kind.OPTIMIZER)]
        if optimizer is not None and global_step is not None:
            tensors = [tensor for tensor in tensors if tensor.key != GLOBAL_STEP]
            tensors.append(whole_tensor(GLOBAL_STEP, np.array([global_step], np.int32)))
        return state_of(*tensors)

    def prepare(self, model: Any, optimizer: Any) -> PreparedArrays:
        tensors = [*_tensors(model, Kind.MODEL), *_tensors(optimizer, Kind.OPTIMIZER)]
        for tensor in tensors:
            _check_writable(tensor)
        return PreparedArrays(tensors, optimizer)

    def random_states(self) -> Mapping[str, Any]:
        return host_random_states()

    def restore_random_states(self, states: Mapping[str, Any]) -> None:
        restore_host_random_states(states)

    def reseed(self, seed: int) -> None:
        reseed_host(seed)

    def to_value(self, value: Any) -> Any:
        return value

    def from_value(self, value: Any) -> Any:
        return value

    def host_buffer(self, nbytes: int) -> np.ndarray:
        return np.empty(nbytes, np.uint8)

    def before_steps(self, call: Callable[[], None]) -> None:
        return None

    def communicator(self) -> Communicator:
        return SingleProcess()


class PreparedArrays:
    """Dictionaries of arrays that a load is going to fill.

    Args:
        tensors: the arrays.
        optimizer: the optimizer's dictionaries.
    """

    def __init__(self, tensors: Sequence[ShardedTensor], optimizer: Any) -> None:
        self._tensors = tensors
        self._optimizer = optimizer

    def destination(self, catalog: Catalog, groups: Sequence[ParameterGroup]) -> ArrayDestination:
        keeps_step = self._optimizer is None or any(tensor.key == GLOBAL_STEP for tensor in self._tensors)
        if keeps_step or GLOBAL_STEP not in catalog.tensors:
            return ArrayDestination(state_of(*self._tensors), self._optimizer, None)
        step = np.zeros(catalog.tensors[GLOBAL_STEP].global_shape, catalog.tensors[GLOBAL_STEP].dtype.numpy)
        return ArrayDestination(state_of(*self._tensors, whole_tensor(GLOBAL_STEP, step)), self._optimizer, step)


class ArrayDestination:
    """Dictionaries of arrays that a load fills in place.

    Args:
        state: the arrays.
        optimizer: the optimizer's dictionaries.
        step: the step count, where the dictionaries have no place for it: `install` gives them one.
    """

    def __init__(self, state: State, optimizer: Any, step: np.ndarray | None) -> None:
        self._state = state
        self._optimizer = optimizer
        self._step = step

    @property
    def state(self) -> State:
        return self._state

    @property
    def installs(self) -> bool:
        return self._step is not None

    def install(self, groups: Sequence[ParameterGroup]) -> None:
        target = self._optimizer if isinstance(self._optimizer, Mapping) else next(iter(self._optimizer or ()), None)
        if self._step is not None and isinstance(target, MutableMapping):
            target["global_step"] = self._step


def holds_arrays(value: Any) -> bool:
    """Whether it is a dictionary of arrays, or a list of such."""
    if isinstance(value, list | tuple):
        return bool(value) and all(holds_arrays(item) for item in value)
    return isinstance(value, Mapping) and all(isinstance(item, np.ndarray | ShardedTensor) for item in value.values())


def _tensors(part: Any, kind: Kind) -> Iterator[ShardedTensor]:
    if part is None:
        return
    for dictionary in part if isinstance(part, list | tuple) else [part]:
        if not isinstance(dictionary, Mapping):
            raise UsageError("not a dictionary of arrays", field=kind.value, found=type(dictionary).__name__)
        for name, value in dictionary.items():
            yield _tensor(parse_tensor_name(name, kind), value)


def _tensor(key: TensorKey, value: Any) -> ShardedTensor:
    name = tensor_name(key)
    if isinstance(value, ShardedTensor):
        _check_memory(value, name)
        return value._replace(key=key)
    if not isinstance(value, np.ndarray):
        raise CaptureError("not an array", tensor=name, found=type(value).__name__, expected="a numpy array or a ShardedTensor")
    try:
        return whole_tensor(key, value)
    except UsageError as error:
        raise CaptureError(error.what, tensor=name, found=error.found, expected=error.expected) from error


def _check_memory(tensor: ShardedTensor, name: str) -> None:
    """See that each part's memory is what the tensor says: a load would fill the wrong elements."""
    for shard in tensor.shards:
        host = shard.memory.host
        if not shard.region.fits(tensor.global_shape) or (
            host is not None and (host.shape != shard.region.shape or host.dtype != tensor.dtype.numpy)
        ):
            raise CaptureError(
                "the memory of a tensor's part is not what the tensor says",
                tensor=name,
                found="no array on the host" if host is None else f"{host.dtype} of shape {list(host.shape)}",
                expected=f"{tensor.dtype} of shape {list(shard.region.shape)}, inside {list(tensor.global_shape)}",
            )


def _check_writable(tensor: ShardedTensor) -> None:
    for shard in tensor.shards:
        if shard.memory.host is not None and not shard.memory.host.flags.writeable:
            raise CaptureError("a load can't fill a read-only array", tensor=tensor_name(tensor.key), fix="give a writable copy")
