"""The adapter for MindSpore."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from reshard.catalog import Catalog
from reshard.comm import Communicator
from reshard.frameworks.mindspore import random
from reshard.frameworks.mindspore.cells import NamedTensors, name_tensors
from reshard.frameworks.mindspore.communicator import DEFAULT_TIMEOUT, connect
from reshard.frameworks.mindspore.destination import MindSporeDestination, capture_slots
from reshard.frameworks.mindspore.optimizers import capture_groups, list_optimizers, step_count, take_apart
from reshard.frameworks.mindspore.values import FRAMEWORK, from_value, to_value
from reshard.state import ParameterGroup, ShardedTensor, State, TensorKey, model_key


class MindSporeAdapter:
    """MindSpore cells and optimizers, whole or as parts that `lay_out` or MindSpore itself describes.

    Args:
        timeout: seconds that a collective or a message of its communicator may take.
    """

    framework = FRAMEWORK

    def __init__(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._timeout = timeout

    def capture(self, model: Any, optimizer: Any, *, global_step: int | None) -> State:
        named = name_tensors(model)
        tensors = _capture_model(named)
        optimizers = [take_apart(one, named) for one in list_optimizers(optimizer)]
        if not optimizers:
            return State(tensors=tensors)
        steps = step_count(optimizers, global_step)
        slots = capture_slots(optimizers, named.layouts, steps)
        return State(tensors={**tensors, **slots}, groups=capture_groups(optimizers))

    def prepare(self, model: Any, optimizer: Any, catalog: Catalog, groups: Sequence[ParameterGroup]) -> MindSporeDestination:
        named = name_tensors(model)
        optimizers = [take_apart(one, named) for one in list_optimizers(optimizer)]
        return MindSporeDestination(_capture_model(named), optimizers, named.layouts, catalog, groups)

    def random_states(self) -> Mapping[str, Any]:
        return random.random_states()

    def restore_random_states(self, states: Mapping[str, Any]) -> None:
        random.restore_random_states(states)

    def reseed(self, seed: int) -> None:
        random.reseed(seed)

    def to_value(self, value: Any) -> Any:
        return to_value(value)

    def from_value(self, value: Any) -> Any:
        return from_value(value)

    def host_buffer(self, nbytes: int) -> np.ndarray:
        return np.empty(nbytes, np.uint8)

    def before_steps(self, call: Callable[[], None]) -> None:
        return None  # MindSpore's steps run inside compiled graphs: nothing is called before one

    def communicator(self) -> Communicator:
        return connect(self._timeout)


def _capture_model(named: NamedTensors) -> dict[TensorKey, ShardedTensor]:
    return {model_key(name): named.layouts.sharded(model_key(name), tensor, name) for name, tensor in named.tensors.items()}
