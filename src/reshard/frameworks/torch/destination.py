"""A run as a destination: its own tensors, the slots that fresh optimizers lack, and what is left to do when all are filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from reshard.catalog import Catalog, StoredTensor
from reshard.errors import CaptureError
from reshard.format.names import tensor_name
from reshard.frameworks.torch.groups import check_groups, install_groups
from reshard.frameworks.torch.layout import Meshes, mirrored
from reshard.frameworks.torch.memory import torch_dtype
from reshard.frameworks.torch.optimizers import STEP, OptimizedParameter, global_step_tensor, number_tensor, slot_tensor
from reshard.frameworks.torch.recipes import is_adam, makes_state_at_once, recipe_of
from reshard.state import GLOBAL_STEP, Kind, ParameterGroup, ShardedTensor, State, TensorKey

# What the step count holds until a load fills it: then nothing was counted, and the counts of the run stay as they are.
_UNFILLED = -1

StoredSlots = Mapping[str, Mapping[str, StoredTensor]]
"""By parameter name and by slot, under the names in keys."""


@dataclass
class _Pending:
    """A parameter's state between `prepare` and `install`.

    Attributes:
        one: the parameter.
        slots: all its slots, those of the optimizer and those that were made for it, in torch's order.
        numbers: the arrays that are filled in the place of numbers.
        has_own_step: whether its step count is filled by itself, not by `global_step`.
        is_stored: whether the checkpoint has any of them. If it hasn't, the parameter stays as it is: fresh moments with the step count
            of a run would be neither a fresh optimizer nor the one that was saved.
    """

    one: OptimizedParameter
    slots: dict[str, Any]
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    has_own_step: bool = False
    is_stored: bool = False


class TorchDestination:
    """A torch run that a load fills.

    Args:
        model_tensors: what the model holds, under the keys of the state.
        extra_states: the tensors that were made for modules with extra state.
        groups: the optimizers' groups with their parameters.
        meshes: the meshes of the model.
        catalog: what the checkpoint holds.
        stored_groups: the checkpoint's hyper-parameters.

    Raises:
        CaptureError: a slot that can't be captured or made.
        MismatchError: the parameters of one of the run's groups have different hyper-parameters in the checkpoint.
    """

    def __init__(
        self,
        model_tensors: Mapping[TensorKey, ShardedTensor],
        extra_states: Sequence[tuple[nn.Module, torch.Tensor]],
        groups: Sequence[tuple[dict[str, Any], Sequence[OptimizedParameter]]],
        meshes: Meshes,
        catalog: Catalog,
        stored_groups: Sequence[ParameterGroup],
    ) -> None:
        self._extra_states = extra_states
        self._groups = groups
        self._meshes = meshes
        check_groups(groups, stored_groups)
        self._pending: list[_Pending] = []
        self._without_state: list[OptimizedParameter] = []
        slots = self._prepare_slots(catalog, stored_groups)
        self._global_step = np.array([_UNFILLED], np.int32)
        if any(STEP in pending.slots for pending in self._pending) or (groups and GLOBAL_STEP in catalog.tensors):
            tensor = global_step_tensor(_UNFILLED, meshes)
            self._global_step = tensor.shards[0].memory.read()
            slots[GLOBAL_STEP] = tensor
        self._state = State(tensors={**model_tensors, **slots})

    @property
    def state(self) -> State:
        return self._state

    @property
    def installs(self) -> bool:
        return bool(self._groups or self._extra_states)

    def install(self, groups: Sequence[ParameterGroup]) -> None:
        """Give the filled slots and these hyper-parameters to the optimizers, and extra states to their modules.

        Raises:
            MismatchError: the parameters of one of the run's groups have different hyper-parameters in the checkpoint.
        """
        check_groups(self._groups, groups)
        with torch.no_grad():
            for pending in self._pending:
                self._install_slots(pending)
            for one in self._without_state:
                _take_state_away(one)
            install_groups(self._groups, groups)
        for module, tensor in self._extra_states:
            module.set_extra_state(tensor)

    def _prepare_slots(self, catalog: Catalog, stored_groups: Sequence[ParameterGroup]) -> dict[TensorKey, ShardedTensor]:
        stored = _slots_by_parameter(catalog)
        known = {name for group in stored_groups for name in group.parameters}
        unstepped = {name for group in stored_groups for name in group.unstepped}
        found: dict[TensorKey, list[ShardedTensor]] = {}
        for _, members in self._groups:
            for one in members:
                mine = stored.get(one.name, {})
                if one.name in unstepped:
                    self._without_state.append(one)
                elif mine or one.state or (one.name in known if known else one.parameter.requires_grad):
                    # A frozen parameter, or one that the checkpoint's run didn't optimize, gets no state that nothing will fill.
                    pending = _Pending(one, _slots_of(one, mine))
                    pending.is_stored = any(slot != STEP and one.key(slot).slot in mine for slot in pending.slots)
                    self._pending.append(pending)
                    for slot in pending.slots:
                        tensor = self._destination(pending, slot, mine)
                        if tensor is not None:
                            found.setdefault(tensor.key, []).append(tensor)
        return {key: mirrored(tensors, tensor_name(key)) for key, tensors in found.items()}

    def _destination(self, pending: _Pending, slot: str, stored: Mapping[str, StoredTensor]) -> ShardedTensor | None:
        """A slot as memory to be filled; None for a step count that `global_step` fills."""
        one, value = pending.one, pending.slots[slot]
        if slot == STEP:
            pending.has_own_step = STEP in stored
            if not pending.has_own_step:
                return None
        if isinstance(value, bool | int | float):
            pending.numbers[slot] = np.array(value)
            return number_tensor(one.key(slot), pending.numbers[slot], self._meshes)
        return slot_tensor(one, slot, value, self._meshes)

    def _install_slots(self, pending: _Pending) -> None:
        one = pending.one
        if not pending.is_stored:
            return
        state = one.optimizer.state[one.parameter]
        for slot, value in pending.slots.items():
            if slot in pending.numbers:
                value = type(value)(pending.numbers[slot].item())
            elif slot == STEP and not pending.has_own_step and self._global_step[0] != _UNFILLED:
                value = _counted(value, int(self._global_step[0]))
            state[slot] = value


def _slots_by_parameter(catalog: Catalog) -> StoredSlots:
    result: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in catalog.tensors.items():
        if key.kind is Kind.OPTIMIZER and key.slot is not None and key.parameter:
            result.setdefault(key.parameter, {})[key.slot] = tensor
    return result


def _slots_of(one: OptimizedParameter, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """All slots of a parameter: the optimizer's, completed by those that it would make at its first step."""
    present = one.state
    with torch.inference_mode(mode=False), torch.no_grad():
        recipe = recipe_of(one.optimizer, one.group, one.parameter)
        if recipe is not None:
            made = {slot: present[slot] if slot in present else make() for slot, make in recipe.items()}
        else:
            made = {} if present else _made_from_catalog(one, stored)
    return {**made, **present}


def _made_from_catalog(one: OptimizedParameter, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The slots of an optimizer that torch doesn't come with, as the checkpoint has them."""
    shape = tuple(one.parameter.shape)
    alike = {slot: tensor for slot, tensor in stored.items() if tensor.global_shape == shape and slot != STEP}
    # Whoever has Adam's moments counts steps too, in a way that only its own first step shows.
    if len(alike) < len(stored) or is_adam(type(one.optimizer)):
        raise CaptureError(
            "how this optimizer makes the state of a parameter is not known",
            tensor=one.name,
            found=f"{type(one.optimizer).__module__}.{type(one.optimizer).__qualname__}, without state",
            expected="an optimizer of torch.optim, or one whose slots all have the parameter's shape, or one that has its state",
            fix="take one optimizer step before loading (what it changes is loaded over), or load without the optimizer",
        )
    return {
        slot: torch.zeros_like(one.parameter, dtype=torch_dtype(tensor.dtype), memory_format=torch.preserve_format)
        for slot, tensor in alike.items()
    }


def _take_state_away(one: OptimizedParameter) -> None:
    """Make a parameter's state what it is before the first step."""
    if not one.state:
        return
    if not makes_state_at_once(one.optimizer):
        del one.optimizer.state[one.parameter]
        return
    for slot, make in (recipe_of(one.optimizer, one.group, one.parameter) or {}).items():
        one.optimizer.state[one.parameter][slot].copy_(make())


def _counted(step: Any, count: int) -> Any:
    """A step count with another value: the same tensor where it is one."""
    if isinstance(step, torch.Tensor):
        return step.fill_(count)
    return type(step)(count)
