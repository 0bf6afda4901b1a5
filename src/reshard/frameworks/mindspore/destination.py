"""A MindSpore run as a destination: its own tensors, and what is left to do when all are filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from mindspore import Parameter

from reshard.catalog import Catalog
from reshard.format.names import tensor_name
from reshard.frameworks.mindspore.layouts import Layouts
from reshard.frameworks.mindspore.optimizers import CapturedOptimizer, install_groups, scalar_key, set_step_count
from reshard.state import GLOBAL_STEP, ParameterGroup, ShardedTensor, State, TensorKey

# What the step count holds until a load fills it: then nothing was counted, and the counts of the run stay as they are.
_UNFILLED = -1


class MindSporeDestination:
    """A MindSpore run that a load fills. Its optimizers have all their slots from the beginning.

    Args:
        model_tensors: what the model holds.
        optimizers: the optimizers, taken apart.
        layouts: how tensors lie.
        catalog: what the checkpoint holds.
        stored_groups: the checkpoint's hyper-parameters.

    Raises:
        CaptureError: a slot that can't be captured.
    """

    def __init__(
        self,
        model_tensors: Mapping[TensorKey, ShardedTensor],
        optimizers: Sequence[CapturedOptimizer],
        layouts: Layouts,
        catalog: Catalog,
        stored_groups: Sequence[ParameterGroup],
    ) -> None:
        self._optimizers = optimizers
        self._step = np.array([_UNFILLED], np.int32)
        self._fresh: list[TensorKey] = []
        self._filled: set[TensorKey] = set()
        unstepped = {name for group in stored_groups for name in group.unstepped}
        tensors = dict(model_tensors)
        for one in optimizers:
            for key, parameter in one.slots.items():
                if key.parameter in unstepped and key not in catalog.tensors:
                    self._fresh.append(key)
                    continue
                owner = one.owners.get(key)
                like = None if owner is None else (key.parameter, owner)
                tensors[key] = layouts.sharded(key, parameter, tensor_name(key), like)
            for name, parameter in one.scalars.items():
                key = scalar_key(name)
                # Checkpoints of MindSpore itself have them; elsewhere they are hyper-parameters.
                if key in catalog.tensors and key not in tensors and catalog.tensors[key].global_shape == tuple(parameter.shape):
                    tensors[key] = layouts.sharded(key, parameter, name)
                    self._filled.add(key)
        if any(one.counters for one in optimizers) or (optimizers and GLOBAL_STEP in catalog.tensors):
            tensors[GLOBAL_STEP] = layouts.of_the_run(GLOBAL_STEP, self._step, _owners(optimizers))
        self._state = State(tensors=tensors)

    @property
    def state(self) -> State:
        return self._state

    @property
    def installs(self) -> bool:
        return bool(self._optimizers)

    def install(self, groups: Sequence[ParameterGroup]) -> None:
        filled = frozenset(self._filled)
        install_groups(self._optimizers, groups, filled)
        for one in self._optimizers:
            for key in self._fresh:
                if key in one.slots:
                    slot = one.slots[key]
                    slot.assign_value(slot * 0)
        if self._step[0] != _UNFILLED:
            set_step_count(self._optimizers, int(self._step[0]), filled)


def capture_slots(optimizers: Sequence[CapturedOptimizer], layouts: Layouts, steps: int | None) -> dict[TensorKey, ShardedTensor]:
    """The slots of optimizers, and their step count.

    Raises:
        CaptureError: a slot that can't be captured.
    """
    tensors: dict[TensorKey, ShardedTensor] = {}
    for one in optimizers:
        for key, parameter in one.slots.items():
            owner = one.owners.get(key)
            tensors[key] = layouts.sharded(key, parameter, tensor_name(key), None if owner is None else (key.parameter, owner))
    if steps is not None:
        tensors[GLOBAL_STEP] = layouts.of_the_run(GLOBAL_STEP, np.array([steps], np.int32), _owners(optimizers))
    return tensors


def _owners(optimizers: Sequence[CapturedOptimizer]) -> Iterator[tuple[str, Parameter]]:
    """The names and parameters that have slots."""
    for one in optimizers:
        for key, owner in one.owners.items():
            yield key.parameter, owner
