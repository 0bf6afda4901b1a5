"""Optimizers as slots and groups by parameter name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import optim

from reshard.errors import CaptureError, UsageError
from reshard.format.names import tensor_name
from reshard.frameworks.torch.layout import Meshes, mirrored
from reshard.frameworks.torch.modules import NamedTensors
from reshard.frameworks.torch.placements import is_dtensor
from reshard.frameworks.torch.recipes import has_recipe, is_adam
from reshard.frameworks.torch.values import to_value
from reshard.geometry import Region
from reshard.geometry.dtypes import by_numpy
from reshard.state import (
    GLOBAL_STEP,
    HostMemory,
    ParameterGroup,
    Shard,
    ShardedTensor,
    TensorKey,
    slot_key,
)

STEP = "step"

Groups = Sequence[tuple[dict[str, Any], Sequence["OptimizedParameter"]]]
"""Every group of every optimizer with its parameters."""

Options = tuple[ParameterGroup, ...]

# AdamW's moments have these names whatever the framework calls them, so that a run can move between frameworks with its optimizer.
_ADAM_SLOTS = {"exp_avg": "adam_m", "exp_avg_sq": "adam_v"}

# What a group has besides hyper-parameters: its parameters (by name in a `ParameterGroup`) and torch's own record of their names.
_NO_OPTIONS = ("params", "param_names")


class OptimizedParameter(NamedTuple):
    """A parameter as one optimizer has it.

    Attributes:
        optimizer: the optimizer, without wrappers around it.
        group: its group in the optimizer.
        parameter: the parameter.
        name: its global name.
    """

    optimizer: optim.Optimizer
    group: dict[str, Any]
    parameter: torch.Tensor
    name: str

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of the parameter without slots that are None; empty when it has none (asking for it makes none)."""
        state = self.optimizer.state.get(self.parameter) or {}
        for value in state.values():
            if value is None:
                return {k: v for k, v in state.items() if v is not None}
        return state

    def key(self, slot: str) -> TensorKey:
        """The key of a slot by the optimizer's own name."""
        name = _slot_name(type(self.optimizer), slot)
        if not name:
            raise CaptureError("a slot's name that can't be kept", tensor=self.name, found=repr(slot), expected="a name without '.'")
        return slot_key(name, self.name)


@cache
def _slot_name(kind: type[optim.Optimizer], slot: str) -> str:
    """What a slot is called in checkpoints; empty when its name can't be kept."""
    name = _ADAM_SLOTS.get(slot, slot) if is_adam(kind) else slot
    return "" if "." in name else name


def list_optimizers(optimizer: Any) -> list[optim.Optimizer]:
    """The optimizers of one, a list or a dictionary of them (its keys mean nothing), without wrappers that keep one in `.optimizer`.

    Raises:
        UsageError: something else than optimizers.
        CaptureError: an optimizer whose state lies on other ranks (ZeroRedundancyOptimizer).
    """
    if optimizer is None:
        return []
    given = [optimizer]
    if isinstance(optimizer, Mapping | list | tuple):
        given = list(optimizer.values() if isinstance(optimizer, Mapping) else optimizer)
    result = []
    for one in given:
        while isinstance(getattr(one, "optimizer", None), optim.Optimizer):
            one = one.optimizer
        if not isinstance(one, optim.Optimizer):
            raise UsageError(
                "not an optimizer", field="optimizer", found=type(one).__name__, expected="torch optimizers, a list or dictionary of them"
            )
        zero = sys.modules.get("torch.distributed.optim")
        if zero is not None and isinstance(one, getattr(zero, "ZeroRedundancyOptimizer", ())):
            raise CaptureError(
                "ZeroRedundancyOptimizer keeps whole parameters' states on single ranks",
                found=type(one).__name__,
                fix="shard parameters and optimizer with torch.distributed.fsdp.fully_shard",
            )
        result.append(one)
    return result


def optimized_parameters(optimizers: Sequence[optim.Optimizer], model: NamedTensors) -> list[list[list[OptimizedParameter]]]:
    """The parameters of every group of every optimizer, with their global names.

    Raises:
        CaptureError: a parameter that isn't the model's, or that two optimizers or groups have; state that belongs to no parameter.
    """
    seen: set[int] = set()
    result = []
    for optimizer in optimizers:
        groups = []
        for group_index, group in enumerate(optimizer.param_groups):
            members = []
            for index, parameter in enumerate(group["params"]):
                name = model.names.get(id(parameter))
                if name is None:
                    raise CaptureError(
                        "an optimizer has a parameter that isn't the model's",
                        field=f"{type(optimizer).__name__}.param_groups[{group_index}]['params'][{index}]",
                        found=f"shape {tuple(parameter.shape)}",
                        fix="give the model together with the optimizer, and make the optimizer after fully_shard, parallelize_module or "
                        "whatever replaces parameters",
                    )
                if id(parameter) in seen:
                    raise CaptureError("two optimizers or groups have the same parameter", tensor=name, fix="give one of them")
                seen.add(id(parameter))
                members.append(OptimizedParameter(optimizer, group, parameter, name))
            groups.append(members)
        for owner in optimizer.state:
            if not isinstance(owner, torch.Tensor):
                raise CaptureError(
                    "an optimizer keeps state that belongs to no parameter",
                    field=f"{type(optimizer).__name__}.state[{owner!r}]",
                    found=type(optimizer.state[owner]).__name__,
                    fix="save that state through extra=",
                )
        result.append(groups)
    return result


def capture_optimizers(groups: Groups, meshes: Meshes, global_step: int | None) -> tuple[dict[TensorKey, ShardedTensor], Options]:
    """The slots of all parameters, and the hyper-parameters of their groups by parameter name.

    Step counts come as one `global_step`, and as `step` slots where they differ from it.

    Args:
        groups: every group of every optimizer with its parameters.
        meshes: the meshes of the model.
        global_step: as in `Adapter.capture`.

    Raises:
        CaptureError: state or an option that can't be captured, naming it.
    """
    stated = [[(one, one.state) for one in members] for _, members in groups]
    slots = _capture_slots([pair for pairs in stated for pair in pairs], meshes, global_step)
    options = tuple(
        ParameterGroup(
            {key: to_value(value, f"option {key!r} of an optimizer's group") for key, value in group.items() if key not in _NO_OPTIONS},
            tuple(dict.fromkeys([one.name for one, _ in pairs])),
            tuple(dict.fromkeys([one.name for one, state in pairs if not state])),
        )
        for (group, _), pairs in zip(groups, stated, strict=True)
    )
    return slots, options


def _capture_slots(
    stated: Sequence[tuple[OptimizedParameter, Mapping[str, Any]]], meshes: Meshes, global_step: int | None
) -> dict[TensorKey, ShardedTensor]:
    counts = _counts(stated)
    if global_step is None and counts:
        global_step = int(max(counts.values()))
    tensors: dict[TensorKey, ShardedTensor] = {}
    repeated: dict[TensorKey, list[ShardedTensor]] = {}  # of tied parameters
    for one, state in stated:
        for slot, value in state.items():
            if slot == STEP and _is_implied(one, counts, global_step):
                continue
            tensor = slot_tensor(one, slot, value, meshes)
            first = tensors.setdefault(tensor.key, tensor)
            if first is not tensor:
                repeated.setdefault(tensor.key, [first]).append(tensor)
    for key, group in repeated.items():
        tensors[key] = mirrored(group, tensor_name(key))
    if global_step is not None:
        tensors[GLOBAL_STEP] = global_step_tensor(global_step, meshes)
    return tensors


def _is_implied(one: OptimizedParameter, counts: Mapping[int, float], global_step: int | None) -> bool:
    """Whether `global_step` says a parameter's step count.

    An optimizer that torch doesn't come with has all its counts stored: nothing else would tell a later load that it counts.
    """
    return counts[id(one.parameter)] == global_step and has_recipe(one.optimizer)


def slot_tensor(one: OptimizedParameter, slot: str, value: Any, meshes: Meshes) -> ShardedTensor:
    """A slot as this rank holds it; a number becomes a 0-d tensor of its own (int64, float64 or bool).

    Raises:
        CaptureError: neither tensor nor number, or a tensor that can't be captured.
    """
    key = one.key(slot)
    if isinstance(value, torch.Tensor):
        return meshes.sharded(key, value, f"{key.slot}.{key.parameter}", like=one.parameter)
    if isinstance(value, bool | int | float):
        return number_tensor(key, np.asarray(value), meshes)
    raise CaptureError(
        "an optimizer's state that is neither a tensor nor a number can't be captured",
        tensor=tensor_name(key),
        found=f"{type(value).__name__} in {type(one.optimizer).__name__}",
        fix="save that state through extra=",
    )


def number_tensor(key: TensorKey, array: np.ndarray, meshes: Meshes) -> ShardedTensor:
    """An array that every rank of the model holds."""
    shard = Shard(Region.whole(array.shape), HostMemory(array))
    return ShardedTensor(key, by_numpy(array.dtype), array.shape, meshes.replicated(array.ndim), (shard,))


def global_step_tensor(value: int, meshes: Meshes) -> ShardedTensor:
    """The step count as the contract has it: int32, shape [1]."""
    return number_tensor(GLOBAL_STEP, np.array([value], np.int32), meshes)


def step_counts(parameters: Iterable[OptimizedParameter]) -> dict[int, float]:
    """How often each parameter was stepped, by identity, for those whose optimizer counts."""
    return _counts((one, one.state) for one in parameters)


def _counts(stated: Iterable[tuple[OptimizedParameter, Mapping[str, Any]]]) -> dict[int, float]:
    counts: dict[int, float] = {}
    # One transfer per device, not per parameter.
    waiting: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    for one, state in stated:
        step = state.get(STEP)
        if isinstance(step, torch.Tensor):
            plain = _plain(step, one)
            if plain.is_cpu:
                counts[id(one.parameter)] = plain.item()
            else:
                waiting.setdefault((plain.device, plain.dtype), []).append((id(one.parameter), plain))
        elif isinstance(step, int | float):
            counts[id(one.parameter)] = step
        elif step is not None:
            raise CaptureError("a step count that is neither a tensor nor a number", tensor=f"step.{one.name}", found=type(step).__name__)
    for pairs in waiting.values():
        values = torch.stack([tensor.reshape(()) for _, tensor in pairs]).tolist()
        counts.update(zip((identity for identity, _ in pairs), values, strict=True))
    return counts


def _plain(step: Any, one: OptimizedParameter) -> torch.Tensor:
    local = step
    if is_dtensor(step):
        with torch.no_grad():
            local = step.to_local()
    if local.numel() != 1:
        raise CaptureError("a step count that isn't one number", tensor=f"step.{one.name}", found=f"shape {tuple(local.shape)}")
    return local


def each_group(
    optimizers: Sequence[optim.Optimizer], members: Sequence[Sequence[Sequence[OptimizedParameter]]]
) -> Iterator[tuple[dict[str, Any], Sequence[OptimizedParameter]]]:
    """Every group of every optimizer with its parameters."""
    for optimizer, groups in zip(optimizers, members, strict=True):
        yield from zip(optimizer.param_groups, groups, strict=True)
