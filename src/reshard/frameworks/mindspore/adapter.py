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
from reshard.frameworks.mindspore.layouts import Layouts
from reshard.frameworks.mindspore.optimizers import CapturedOptimizer, capture_groups, list_optimizers, step_count, take_apart
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

    def prepare(self, model: Any, optimizer: Any) -> MindSporePrepared:
        named = name_tensors(model)
        optimizers = [take_apart(one, named) for one in list_optimizers(optimizer)]
        return MindSporePrepared(_capture_model(named), optimizers, named.layouts)

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


class MindSporePrepared:
    """A MindSpore run that a load is going to fill.

    Args:
        tensors: what its model holds.
        optimizers: its optimizers, taken apart.
        layouts: how its tensors lie.
    """

    def __init__(self, tensors: Mapping[TensorKey, ShardedTensor], optimizers: Sequence[CapturedOptimizer], layouts: Layouts) -> None:
        self._tensors = tensors
        self._optimizers = optimizers
        self._layouts = layouts

    def destination(self, catalog: Catalog, groups: Sequence[ParameterGroup]) -> MindSporeDestination:
        return MindSporeDestination(self._tensors, self._optimizers, self._layouts, catalog, groups)


def _capture_model(named: NamedTensors) -> dict[TensorKey, ShardedTensor]:
    return {model_key(name): named.layouts.sharded(model_key(name), tensor, name) for name, tensor in named.tensors.items()}
