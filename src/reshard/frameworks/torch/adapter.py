"""The adapter for PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from reshard.catalog import Catalog
from reshard.comm import Communicator
from reshard.errors import CaptureError
from reshard.frameworks.torch import random
from reshard.frameworks.torch.communicator import DEFAULT_TIMEOUT, connect
from reshard.frameworks.torch.destination import TorchDestination
from reshard.frameworks.torch.groups import RunGroups
from reshard.frameworks.torch.layout import Meshes, mirrored
from reshard.frameworks.torch.memory import torch_dtype
from reshard.frameworks.torch.modules import NamedTensors, name_tensors
from reshard.frameworks.torch.optimizers import capture_optimizers, each_group, list_optimizers, optimized_parameters
from reshard.frameworks.torch.transfer import pinned_buffer
from reshard.frameworks.torch.values import FRAMEWORK, from_value, to_value
from reshard.state import Kind, ParameterGroup, ShardedTensor, State, TensorKey, model_key


class TorchAdapter:
    """PyTorch modules and optimizers, plain or distributed by DTensor.

    An adapter that captures again knows how the tensors lay the last time; it looks only at what has changed.

    Args:
        timeout: seconds that a collective or a message of its communicator may take.
    """

    framework = FRAMEWORK

    def __init__(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._timeout = timeout
        self._captured: Meshes | None = None

    def capture(self, model: Any, optimizer: Any, *, global_step: int | None) -> State:
        named = name_tensors(model)
        meshes = self._captured = Meshes(named.all_tensors(), named.fsdp2, self._captured)
        tensors = _capture_model(named, meshes)
        for name, module in named.extra_states.items():
            value = _extra_state(module, name)
            if value is not None:
                _add(tensors, meshes.sharded(model_key(name), value, name))
        optimizers = list_optimizers(optimizer)
        if optimizers:
            groups = list(each_group(optimizers, optimized_parameters(optimizers, named)))
            slots, options = capture_optimizers(groups, meshes, global_step)
            tensors.update(slots)
            updated = [model_key(name) for group in options for name in group.parameters]
            return State(tensors=tensors, groups=options, updated=frozenset(slots).union(updated))
        return State(tensors=tensors)

    def prepare(self, model: Any, optimizer: Any) -> TorchPrepared:
        named = name_tensors(model)
        meshes = Meshes(named.all_tensors(), named.fsdp2)
        optimizers = list_optimizers(optimizer)
        members = list(each_group(optimizers, optimized_parameters(optimizers, named)))
        return TorchPrepared(named, meshes, _capture_model(named, meshes), members)

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
        return pinned_buffer(nbytes)

    def before_steps(self, call: Callable[[], None]) -> Callable[[], None]:
        # Process-wide: optimizers that are made later, or that step inside the backward pass, are seen, too.
        return register_optimizer_step_pre_hook(lambda *_: call()).remove

    def communicator(self) -> Communicator:
        return connect(self._timeout)


class TorchPrepared:
    """A torch run that a load is going to fill.

    Args:
        named: its model, by names.
        meshes: the meshes of its model.
        tensors: what its model holds, extra states apart.
        groups: its optimizers' groups with their parameters.
    """

    def __init__(self, named: NamedTensors, meshes: Meshes, tensors: Mapping[TensorKey, ShardedTensor], groups: RunGroups) -> None:
        self._named = named
        self._meshes = meshes
        self._tensors = tensors
        self._groups = groups

    def destination(self, catalog: Catalog, groups: Sequence[ParameterGroup]) -> TorchDestination:
        tensors = dict(self._tensors)
        extra_states = []
        for name, module in self._named.extra_states.items():
            value = _extra_state(module, name)
            stored = catalog.tensors.get(model_key(name))
            if stored is not None:
                device = "cpu" if value is None else value.device
                value = torch.empty(stored.global_shape, dtype=torch_dtype(stored.dtype), device=device)
                extra_states.append((module, value))
            if value is not None:
                _add(tensors, self._meshes.sharded(model_key(name), value, name))
        return TorchDestination(tensors, extra_states, self._groups, self._meshes, catalog, groups)


def _capture_model(named: NamedTensors, meshes: Meshes) -> dict[TensorKey, ShardedTensor]:
    result: dict[TensorKey, ShardedTensor] = {}
    sharded, kind, new = meshes.sharded, Kind.MODEL, tuple.__new__
    for name, tensors in named.tensors.items():
        key = new(TensorKey, (kind, None, name))  # `model_key` in half the time: states have 100,000 tensors
        if len(tensors) == 1:
            result[key] = sharded(key, tensors[0], name)
        else:
            result[key] = mirrored([sharded(key, tensor, name) for tensor in tensors], name)
    return result


def _add(tensors: dict[TensorKey, ShardedTensor], tensor: ShardedTensor) -> None:
    if tensor.key in tensors:
        raise CaptureError("a module's extra state has the name of a tensor", tensor=tensor.key.parameter, fix="rename the tensor")
    tensors[tensor.key] = tensor


def _extra_state(module: nn.Module, name: str) -> torch.Tensor | None:
    """What a module gives as its extra state.

    Raises:
        CaptureError: something else than a tensor or None.
    """
    value = module.get_extra_state()
    if value is None or isinstance(value, torch.Tensor):
        return value
    raise CaptureError(
        "a module's extra state that isn't a tensor can't be kept",
        tensor=name,
        found=f"{type(value).__name__} from {type(module).__name__}.get_extra_state",
        expected="a tensor or None",
        fix="return a tensor from get_extra_state, or save that state through extra=",
    )
